// Reads Megatron's indexed corpora (`prefix.idx`, `prefix.bin`; index format MMIDIDX, version 1) at places.
//
// Index layout, little-endian: magic (9 bytes), version u64, dtype code u8, sequence count u64, length of the
// document index u64, then sequence lengths i32[sequences], byte offsets i64[sequences], document index i64[].
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "corpus_error.h"
#include "file.h"
#include "load.h"

namespace megatron_lpr {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "Megatron corpora are little-endian");

// Sizes of a corpus, checked against the sizes of its two files without reading its body.
struct CorpusHeader {
  static constexpr std::uint64_t kBytes = 34;

  std::uint8_t dtype_code = 0;
  std::uint64_t token_bytes = 0;
  std::uint64_t sequences = 0;
  std::uint64_t documents = 0;
  std::uint64_t tokens = 0;
};

namespace detail {

// Bytes per token by Megatron's dtype code; 0 where tokens cannot have that type (int8 and floats).
inline std::uint64_t token_bytes(std::uint8_t dtype_code) {
  constexpr std::array<std::uint64_t, 9> kBytes{0, 1, 0, 2, 4, 8, 0, 0, 2};
  return dtype_code < kBytes.size() ? kBytes[dtype_code] : 0;
}

inline CorpusHeader check_index(const File& index) {
  constexpr char kMagic[] = "MMIDIDX\0";  // nine bytes with the terminator
  const std::string& path = index.path();
  if (index.size() < CorpusHeader::kBytes) throw CorpusError(path + " is truncated: shorter than an index header");
  unsigned char magic[sizeof(kMagic)];
  index.read(0, sizeof(magic), magic);
  if (std::memcmp(magic, kMagic, sizeof(kMagic)) != 0) throw CorpusError(path + " is not a Megatron index (bad magic)");
  if (load<std::uint64_t>(index, 9) != 1) throw CorpusError(path + " has an unsupported index version; expected 1");

  CorpusHeader header;
  header.dtype_code = load<std::uint8_t>(index, 17);
  header.token_bytes = token_bytes(header.dtype_code);
  if (header.token_bytes == 0)
    throw CorpusError(path + " holds no integer tokens (dtype code " + std::to_string(header.dtype_code) + ")");
  header.sequences = load<std::uint64_t>(index, 18);
  const auto boundaries = load<std::uint64_t>(index, 26);
  if (header.sequences == 0 || boundaries < 2) throw CorpusError(path + " describes an empty corpus");

  // A multimodal index has one more byte per sequence. Counts are bounded first so that the sum cannot overflow.
  const std::uint64_t body = index.size() - CorpusHeader::kBytes;
  const bool fits = header.sequences <= body / 12 && boundaries <= body / 8;
  const std::uint64_t expected = fits ? header.sequences * 12 + boundaries * 8 : 0;
  if (!fits || (body != expected && body != expected + header.sequences))
    throw CorpusError(path + " has the wrong size for " + std::to_string(header.sequences) +
                      " sequences: it is truncated or corrupt");
  header.documents = boundaries - 1;

  const std::uint64_t document_index = CorpusHeader::kBytes + header.sequences * 12;
  if (load<std::int64_t>(index, document_index) != 0 ||
      load<std::uint64_t>(index, document_index + header.documents * 8) != header.sequences)
    throw CorpusError(path + " is corrupt: its documents do not cover its sequences");
  return header;
}

}  // namespace detail

class CorpusReader {
 public:
  // Tokens must lie in [0, vocab_size); 0: any may be there.
  explicit CorpusReader(const std::string& prefix, std::uint64_t vocab_size = 0)
      : CorpusReader(prefix, vocab_size, File(prefix + ".idx")) {}

  const CorpusHeader& header() const { return header_; }
  std::int64_t modified() const { return bin_.modified(); }  // seconds since 1970

  // Copies tokens [first, first + count) of the concatenated documents, widened to 64 bits, and to `labels` the token
  // that follows each.
  void read(std::uint64_t first, std::uint64_t count, std::int64_t* tokens, std::int64_t* labels) const {
    if (first >= header_.tokens || count >= header_.tokens - first)
      throw std::out_of_range("tokens past the end of the corpus");
    switch (header_.dtype_code) {
      case 1: return read_as<std::uint8_t>(first, count, tokens, labels);
      case 3: return read_as<std::int16_t>(first, count, tokens, labels);
      case 4: return read_as<std::int32_t>(first, count, tokens, labels);
      case 5: return read_as<std::int64_t>(first, count, tokens, labels);
      default: return read_as<std::uint16_t>(first, count, tokens, labels);
    }
  }

 private:
  CorpusReader(const std::string& prefix, std::uint64_t vocab_size, const File& index)
      : vocab_size_(vocab_size), header_(detail::check_index(index)), bin_(prefix + ".bin") {
    if (bin_.size() % header_.token_bytes != 0)
      throw CorpusError(prefix + ".bin is truncated: its size is no multiple of the token size");
    header_.tokens = bin_.size() / header_.token_bytes;
    // Between its two ends the index is checked where it is used: reading it all would take minutes for 1e9 documents.
    const std::uint64_t offsets = CorpusHeader::kBytes + header_.sequences * 4;
    if (load<std::int64_t>(index, offsets) != 0)
      throw CorpusError(prefix + ".idx is corrupt: its first sequence is not at the start of " + prefix + ".bin");
    const std::uint64_t last = header_.sequences - 1;
    const auto length = load<std::int32_t>(index, CorpusHeader::kBytes + last * 4);
    const auto offset = load<std::int64_t>(index, offsets + last * 8);
    if (length < 0 || static_cast<std::uint64_t>(offset) > bin_.size() ||
        static_cast<std::uint64_t>(length) * header_.token_bytes != bin_.size() - static_cast<std::uint64_t>(offset))
      throw CorpusError(prefix + ".bin does not end where " + prefix + ".idx says: one of the two is truncated");
  }

  template <typename T>
  void read_as(std::uint64_t first, std::uint64_t count, std::int64_t* tokens, std::int64_t* labels) const {
    constexpr std::uint64_t kTokens = 8192;
    T buffer[kTokens + 1];
    for (std::uint64_t done = 0; done < count;) {
      const std::uint64_t here = std::min(kTokens, count - done);
      bin_.read((first + done) * sizeof(T), (here + 1) * sizeof(T), buffer);
      check(buffer, here + 1, first + done);
      for (std::uint64_t i = 0; i < here; ++i) {
        tokens[done + i] = buffer[i];
        labels[done + i] = buffer[i + 1];
      }
      done += here;
    }
  }

  // One pass over the largest, as unsigned numbers, among which negative ones come last.
  template <typename T>
  void check(const T* tokens, std::uint64_t count, std::uint64_t first) const {
    if (vocab_size_ == 0) return;
    using Unsigned = std::make_unsigned_t<T>;
    const std::uint64_t most = std::min<std::uint64_t>(vocab_size_ - 1, std::numeric_limits<T>::max());
    Unsigned largest = 0;
    for (std::uint64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<Unsigned>(tokens[i]));
    if (largest <= most) return;
    std::uint64_t wrong = 0;
    while (static_cast<Unsigned>(tokens[wrong]) <= most) ++wrong;
    throw CorpusError(bin_.path() + " is corrupt, or was made with another tokenizer: token " +
                      std::to_string(first + wrong) + " is " + std::to_string(std::int64_t{tokens[wrong]}) +
                      ", the vocabulary has " + std::to_string(vocab_size_));
  }

  std::uint64_t vocab_size_;
  CorpusHeader header_;
  File bin_;
};

}  // namespace megatron_lpr
