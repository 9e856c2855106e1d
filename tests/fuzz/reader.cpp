// Fuzzes the readers of corpora: whatever bytes the files hold, the outcome is a corpus or an exception that names a
// file, never a crash, an over-read or undefined behaviour. `make fuzz` runs it.
//
// Files live on the heap, each in an allocation of its exact size, so that AddressSanitizer sees a read one byte past
// the end, which mmap would hide inside the last page. With clang it is a libFuzzer target (-DLIBFUZZER); elsewhere it
// brings its own mutations of valid corpora: reader [runs] [seed].
#define MEGATRON_LPR_MAPPED_FILE_H

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "corpus_error.h"

namespace megatron_lpr {

using Bytes = std::vector<unsigned char>;
inline std::map<std::string, Bytes> files;

class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const auto found = files.find(path);
    if (found == files.end()) throw CorpusError("cannot open " + path);
    if (found->second.empty()) throw CorpusError(path + " is empty");
    size_ = found->second.size();
    data_.reset(new unsigned char[size_]);
    std::memcpy(data_.get(), found->second.data(), size_);
  }
  const unsigned char* data() const { return data_.get(); }
  std::uint64_t size() const { return size_; }

 private:
  std::unique_ptr<unsigned char[]> data_;
  std::uint64_t size_ = 0;
};

}  // namespace megatron_lpr

#include "documents.h"
#include "languages.h"
#include "reader.h"

namespace {

using megatron_lpr::Bytes;
using megatron_lpr::files;

struct Outcomes {
  std::uint64_t opened = 0, read = 0, refused = 0;
} outcomes;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

template <typename Work>
void expect_no_crash(Work&& work) {
  try {
    work();
    ++outcomes.read;
  } catch (const megatron_lpr::CorpusError& error) {
    ++outcomes.refused;
    require(std::strstr(error.what(), "corpus.") != nullptr, "an error that names no file");
  }
}

// Opens the corpus in `files` and reads all of it in every way there is.
void read_everything() {
  std::unique_ptr<megatron_lpr::CorpusReader> reader;
  expect_no_crash([&] { reader = std::make_unique<megatron_lpr::CorpusReader>("corpus"); });
  if (!reader) return;
  ++outcomes.opened;
  const megatron_lpr::CorpusHeader& header = reader->header();
  std::vector<std::int64_t> tokens(header.tokens);
  expect_no_crash([&] { reader->read(0, header.tokens, tokens.data()); });
  try {
    reader->read(header.tokens, 1, tokens.data());
    require(false, "a read past the end of the corpus");
  } catch (const std::out_of_range&) {
  }
  expect_no_crash([&] {
    const megatron_lpr::DocumentOffsets documents("corpus", header);
    for (std::uint64_t document = 0; document < documents.size(); ++document)
      expect_no_crash([&] {
        const std::uint64_t start = documents.start(document), length = documents.length(document);
        require(start <= header.tokens && length <= header.tokens - start, "a document outside the corpus");
      });
    for (std::uint64_t token = 0; token < header.tokens; ++token)
      expect_no_crash([&] { require(documents.containing(token) < header.documents, "a token without document"); });
  });
  expect_no_crash([&] {
    const megatron_lpr::LanguageRuns runs("corpus", header.tokens, 3);
    for (std::uint64_t first = 0; first <= header.tokens; ++first)
      expect_no_crash([&] {
        std::uint64_t seen = 0;
        runs.for_each(first, header.tokens - first, [&](std::uint64_t language, std::uint64_t count) {
          require(language < 3, "an unknown language");
          seen += count;
        });
        require(seen == header.tokens - first, "languages of too few or too many tokens");
      });
  });
}

// An input is two u16 sizes, of .idx and .bin, and the three files one after the other.
void run(const unsigned char* data, std::size_t size) {
  std::uint16_t sizes[2] = {0, 0};
  if (size >= sizeof(sizes)) std::memcpy(sizes, data, sizeof(sizes));
  const unsigned char* end = data + size;
  data += std::min(size, sizeof(sizes));
  files.clear();
  for (const auto& [suffix, bytes] : {std::pair<const char*, std::size_t>{"idx", sizes[0]}, {"bin", sizes[1]}}) {
    const std::size_t taken = std::min<std::size_t>(bytes, end - data);
    files[std::string("corpus.") + suffix] = Bytes(data, data + taken);
    data += taken;
  }
  files["corpus.lang"] = Bytes(data, end);
  read_everything();
}

}  // namespace

#ifdef LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  run(data, size);
  return 0;
}
#else

namespace {

using Random = std::mt19937_64;

template <typename T>
void put(Bytes& bytes, T value) {
  const auto* first = reinterpret_cast<const unsigned char*>(&value);
  bytes.insert(bytes.end(), first, first + sizeof(T));
}

// A valid corpus of a few documents, some of several sequences, as an input of `run`.
Bytes valid_corpus(Random& random) {
  constexpr std::pair<std::uint8_t, unsigned> kTypes[] = {{1, 1}, {3, 2}, {4, 4}, {5, 8}, {8, 2}};
  const auto [code, width] = kTypes[random() % 5];
  std::vector<std::int32_t> lengths(1 + random() % 6);
  for (auto& length : lengths) length = static_cast<std::int32_t>(1 + random() % 5);
  std::vector<std::int64_t> documents{0};
  while (documents.back() < static_cast<std::int64_t>(lengths.size()))
    documents.push_back(std::min<std::int64_t>(documents.back() + 1 + random() % 2, lengths.size()));
  Bytes idx{'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0}, bin, lang{'L', 'P', 'R', 'L', 'A', 'N', 'G', '1'};
  put<std::uint64_t>(idx, 1);
  put<std::uint8_t>(idx, code);
  put<std::uint64_t>(idx, lengths.size());
  put<std::uint64_t>(idx, documents.size());
  std::int64_t tokens = 0;
  for (const auto length : lengths) put(idx, length);
  for (const auto length : lengths) {
    put<std::int64_t>(idx, tokens * width);
    tokens += length;
  }
  for (const auto document : documents) put(idx, document);
  for (std::int64_t byte = 0; byte < tokens * width; ++byte) put<std::uint8_t>(bin, random());
  const std::uint64_t runs = std::min<std::uint64_t>(1 + random() % 4, tokens);
  put(lang, runs);
  for (std::uint64_t first = 0; first < runs; ++first) put(lang, first);
  for (std::uint64_t first = 0; first < runs; ++first) put<std::uint16_t>(lang, first % 3);
  Bytes input;
  put<std::uint16_t>(input, idx.size());
  put<std::uint16_t>(input, bin.size());
  for (const Bytes& file : {idx, bin, lang}) input.insert(input.end(), file.begin(), file.end());
  return input;
}

void mutate(Bytes& input, Random& random) {
  constexpr std::uint64_t kInteresting[] = {0, 1, 2, 7, 8, 1ull << 31, (1ull << 31) - 1, 1ull << 32, 1ull << 61,
                                            1ull << 63, (1ull << 63) - 1, ~0ull, ~0ull - 1, ~0ull / 12, ~0ull / 12 + 1};
  const std::size_t at = random() % input.size(), last = input.size() - at;
  const std::uint64_t value = kInteresting[random() % (sizeof(kInteresting) / sizeof(*kInteresting))];
  switch (random() % 7) {
    case 0: input[at] ^= static_cast<unsigned char>(1u << random() % 8); break;
    case 1: input[at] = static_cast<unsigned char>(random()); break;
    case 2: std::memcpy(&input[at], &value, std::min<std::size_t>(8, last)); break;
    case 3: std::memcpy(&input[at], &value, std::min<std::size_t>(4, last)); break;
    case 4: input.resize(at + 1); break;  // truncated
    case 5: input.insert(input.begin() + at, 1 + random() % 9, static_cast<unsigned char>(random())); break;
    default: input.erase(input.begin() + at, input.begin() + at + std::min<std::size_t>(1 + random() % 9, last)); break;
  }
  if (input.empty()) input.push_back(0);
}

}  // namespace

int main(int count, char** arguments) {
  const std::uint64_t runs = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1000000;
  Random random(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0);
  for (std::uint64_t number = 0; number < runs; ++number) {
    Bytes input = valid_corpus(random);
    if (number % 16 == 0) {
      const std::uint64_t refused = outcomes.refused;
      run(input.data(), input.size());
      require(outcomes.refused == refused, "a valid corpus was refused");
    }
    for (std::uint64_t mutations = 1 + random() % 4; mutations > 0; --mutations) mutate(input, random);
    run(input.data(), input.size());
  }
  std::printf("%llu corrupt corpora: %llu opened, %llu refusals by name, no crash\n",
              static_cast<unsigned long long>(runs), static_cast<unsigned long long>(outcomes.opened),
              static_cast<unsigned long long>(outcomes.refused));
}

#endif
