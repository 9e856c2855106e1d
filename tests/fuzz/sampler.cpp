// Fuzzes the sampler over its corpora: whatever bytes the files hold, the outcome is samples or an exception that names a
// file, never another one, a crash, an over-read or undefined behaviour. `make fuzz` runs it.
//
// With clang it is a libFuzzer target (-DLIBFUZZER); elsewhere it brings its own mutations of valid corpora:
// sampler [runs] [seed]. The digest that it prints then is of all batches: the same on every machine.
#include "inputs.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "sampler.h"

namespace {

using namespace megatron_lpr;

constexpr std::uint64_t kLanguages = 3;
constexpr std::uint64_t kVocabulary = 100;

struct Outcomes {
  std::uint64_t batches = 0, refused = 0, digest = 0xcbf29ce484222325;

  // FNV-1a, eight bytes at a time.
  void sum_up(std::uint64_t value) { digest = (digest ^ value) * 0x100000001b3; }
} outcomes;

// Whether `work` came to its end; it may end in a CorpusError, and in nothing else.
template <typename Work>
bool refused_by_name(Work&& work) {
  try {
    work();
    return false;
  } catch (const CorpusError& error) {
    ++outcomes.refused;
    require(std::strstr(error.what(), "corpus") != nullptr && std::strchr(error.what(), '.') != nullptr,
            "an error that names no file");
    return true;
  }
}

// A sampler that the first bytes of an input describe; its settings are always valid.
std::unique_ptr<Sampler> make_sampler(const unsigned char* settings) {
  const std::size_t corpora = 1 + settings[1] % fuzz::kCorpora;
  std::vector<CorpusSpec> specs;
  std::vector<std::uint64_t> weights;
  bool expanded = false, original = false;
  for (std::size_t i = 0; i < corpora; ++i) {
    const unsigned char* own = settings + 8 + 8 * i;
    CorpusSpec spec{"corpus" + std::to_string(i), own[0], own[1] % 2 == 0, {1}, own[2] % 2 == 0, 1, 2, 0, 0};
    if (spec.sidecar) spec.tags = {-1, 2, 3};
    refused_by_name([&] {  // what no header tells is anything
      const CorpusHeader header = CorpusReader(spec.prefix).header();
      spec.documents = header.documents;
      spec.tokens = header.tokens;
    });
    if (own[3] % 3 == 1) spec.document_limit = 1 + own[4] % 8;
    if (own[3] % 3 == 2) spec.token_limit = 2 + own[4] % 40;
    (spec.expanded ? expanded : original) = true;
    specs.push_back(spec);
    weights.push_back(1 + own[5] % 7);
  }
  const std::uint64_t share = !original ? 8 : !expanded ? 0 : 1 + settings[2] % 7;
  std::vector<MixtureSpec> mixtures{{0, Split(share, 8), weights}};
  std::reverse(weights.begin(), weights.end());
  if (settings[3] % 2 == 1) mixtures.push_back({1 + settings[3] % 16u, Split(share, 8), weights});
  const WindowRule windows{1 + settings[4] % 12u, settings[5] % 3 == 0, settings[5] % 3 == 1};
  return std::make_unique<Sampler>(
      specs, mixtures, SamplerSettings{windows, settings[6], 0, kVocabulary, kLanguages, settings[7] % 2 == 1});
}

// Batches of their exact size, so that AddressSanitizer sees a position too many; returns what `count` should.
std::vector<std::uint64_t> fill(const Sampler& sampler, std::uint64_t first, std::uint64_t samples) {
  const std::uint64_t positions = samples * sampler.seq_length();
  const std::unique_ptr<std::int64_t[]> tokens(new std::int64_t[positions]), labels(new std::int64_t[positions]),
      tags(new std::int64_t[positions]);
  const std::unique_ptr<float[]> loss_mask(new float[positions]);
  const std::unique_ptr<std::int32_t[]> documents(sampler.document_ids() ? new std::int32_t[positions] : nullptr);
  sampler.fill(first, samples, {tokens.get(), labels.get(), loss_mask.get(), tags.get(), documents.get()});
  std::vector<std::uint64_t> seen(kLanguages, 0);
  for (std::uint64_t i = 0; i < positions; ++i) {
    const auto language = static_cast<std::uint64_t>(std::abs(tags[i]));
    require(0 <= tokens[i] && tokens[i] < 100 && 0 <= labels[i] && labels[i] < 100, "a token of no vocabulary");
    require(language <= kLanguages && (language != 0) == (loss_mask[i] == 1.0F), "a tag of no language");
    require(!documents || (documents[i] >= 0) == (language != 0), "a position of no document");
    if (language != 0) ++seen[language - 1];
    for (const std::int64_t value : {tokens[i], labels[i], tags[i]}) outcomes.sum_up(static_cast<std::uint64_t>(value));
    if (documents) outcomes.sum_up(static_cast<std::uint64_t>(documents[i]));
  }
  ++outcomes.batches;
  return seen;
}

// Where a sample lies, and which documents it holds.
void look_up(const Sampler& sampler, const Pick& pick) {
  const SampledCorpus& corpus = sampler.corpus(pick.corpus);
  require(pick.window < corpus.samples(), "a window past the epoch's last");
  const auto [head, tail] = corpus.spans(pick.window, pick.epoch);
  require(head.count + tail.count <= sampler.seq_length(), "a window that is too long");
  for (const auto& span : {head, tail}) {
    std::uint64_t next = span.first;
    if (!sampler.document_ids()) continue;
    corpus.for_each_document(span, [&](std::uint64_t, std::uint64_t first, std::uint64_t count) {
      require(first == next && count > 0, "documents with a gap");
      next += count;
    });
    require(next == span.first + span.count, "documents of too few or too many positions");
  }
}

std::uint64_t sum(const std::vector<std::uint64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), std::uint64_t{0});
}

// Runs of languages that are out of order may be met from one side and not from the other, so that only the languages of
// `valid` files are always counted as they are read.
void use(const Sampler& sampler, bool valid) {
  for (const auto& [first, samples] : {std::pair<std::uint64_t, std::uint64_t>{0, 24}, {17, 3}, {1ull << 40, 2}}) {
    std::vector<std::uint64_t> filled, counted;
    const bool unread = refused_by_name([&, first = first, samples = samples] { filled = fill(sampler, first, samples); });
    const bool uncounted =
        refused_by_name([&, first = first, samples = samples] { counted = sampler.count(first, samples); });
    require(unread || uncounted || sum(filled) == sum(counted), "a count that is not what is read");
    require(!valid || filled == counted, "a count of other languages than are read");
    const std::vector<std::uint64_t> before = sampler.samples_before(first), after = sampler.samples_before(first + samples);
    require(sum(after) == first + samples && before <= after, "samples of no corpus");
    sampler.for_each(first, samples, [&](const Pick& pick) { refused_by_name([&] { look_up(sampler, pick); }); });
  }
}

// Everything that can be read of a corpus' .idx and .lang files, as verify-data does.
void read_all(const std::string& prefix) {
  refused_by_name([&] {
    const CorpusHeader header = CorpusReader(prefix).header();
    const DocumentOffsets documents(prefix, header);
    const std::vector<std::int64_t> bounds = documents.boundaries(0, documents.size());
    require(bounds.front() == 0 && static_cast<std::uint64_t>(bounds.back()) == header.tokens,
            "documents that do not cover the corpus");
    require(std::is_sorted(bounds.begin(), bounds.end()), "documents that go back");
    LanguageRuns(prefix, header.tokens, kLanguages).check();
  });
}

void run(const unsigned char* data, std::size_t size, bool valid = false) {
  Bytes input(data, data + size);
  if (input.size() < fuzz::kHead) input.resize(fuzz::kHead);
  files.clear();
  std::size_t place = fuzz::kHead;
  for (std::size_t i = 0; i < 3 * fuzz::kCorpora; ++i) {
    std::uint16_t bytes;
    std::memcpy(&bytes, &input[fuzz::kSettings + 2 * i], sizeof(bytes));
    const std::size_t end = std::min(input.size(), place + bytes);
    constexpr const char* kSuffixes[] = {".idx", ".bin", ".lang"};
    files["corpus" + std::to_string(i / 3) + kSuffixes[i % 3]] = Bytes(input.begin() + place, input.begin() + end);
    place = end;
  }
  for (std::size_t i = 0; i < fuzz::kCorpora; ++i) read_all("corpus" + std::to_string(i));
  std::unique_ptr<Sampler> sampler;
  if (refused_by_name([&] { sampler = make_sampler(input.data()); })) return;
  if (input[0] != 0) {  // one of the files is cut short while it is read
    Bytes& cut = std::next(files.begin(), input[0] % files.size())->second;
    cut.resize(cut.size() * (input[0] / 16) / 16);
  }
  use(*sampler, valid);
}

}  // namespace

#ifdef LIBFUZZER

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed) {
  fuzz::Random random(seed);
  if (size > fuzz::kHead && random() % 2 == 0) return LLVMFuzzerMutate(data, size, max_size);
  Bytes input = size > fuzz::kHead ? Bytes(data, data + size) : fuzz::valid_input(random);
  fuzz::mutate(input, random);
  size = std::min(input.size(), max_size);
  std::memcpy(data, input.data(), size);
  return size;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  run(data, size);
  return 0;
}

#else

int main(int count, char** arguments) {
  const std::uint64_t runs = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1000000;
  fuzz::Random random(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0);
  for (std::uint64_t number = 0; number < runs; ++number) {
    Bytes input = fuzz::valid_input(random);
    if (number % 16 == 0) {
      const std::uint64_t refused = outcomes.refused;
      run(input.data(), input.size(), true);
      require(outcomes.refused == refused, "a valid corpus was refused");
    }
    for (std::uint64_t mutations = 1 + random() % 4; mutations > 0; --mutations) fuzz::mutate(input, random);
    run(input.data(), input.size());
  }
  std::printf("%llu corrupt corpora: %llu batches read (digest %016llx), %llu refusals by name, no crash\n",
              static_cast<unsigned long long>(runs), static_cast<unsigned long long>(outcomes.batches),
              static_cast<unsigned long long>(outcomes.digest), static_cast<unsigned long long>(outcomes.refused));
}

#endif
