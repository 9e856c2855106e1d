// Reads Megatron's indexed corpora (`prefix.idx`, `prefix.bin`; index format MMIDIDX, version 1) by mmap.
//
// Index layout, little-endian: magic (9 bytes), version u64, dtype code u8, sequence count u64, length of the
// document index u64, then sequence lengths i32[sequences], byte offsets i64[sequences], document index i64[].
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "corpus_error.h"
#include "mapped_file.h"

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

template <typename T>
T load(const unsigned char* data, std::uint64_t offset) {
  T value;
  std::memcpy(&value, data + offset, sizeof(T));
  return value;
}

// Bytes per token by Megatron's dtype code; 0 where tokens cannot have that type (int8 and floats).
inline std::uint64_t token_bytes(std::uint8_t dtype_code) {
  constexpr std::array<std::uint64_t, 9> kBytes{0, 1, 0, 2, 4, 8, 0, 0, 2};
  return dtype_code < kBytes.size() ? kBytes[dtype_code] : 0;
}

inline CorpusHeader check_index(const std::string& path, const MappedFile& index) {
  constexpr char kMagic[] = "MMIDIDX\0";  // nine bytes with the terminator
  const unsigned char* data = index.data();
  if (index.size() < CorpusHeader::kBytes) throw CorpusError(path + " is truncated: shorter than an index header");
  if (std::memcmp(data, kMagic, sizeof(kMagic)) != 0) throw CorpusError(path + " is not a Megatron index (bad magic)");
  if (load<std::uint64_t>(data, 9) != 1) throw CorpusError(path + " has an unsupported index version; expected 1");

  CorpusHeader header;
  header.dtype_code = data[17];
  header.token_bytes = token_bytes(header.dtype_code);
  if (header.token_bytes == 0)
    throw CorpusError(path + " holds no integer tokens (dtype code " + std::to_string(header.dtype_code) + ")");
  header.sequences = load<std::uint64_t>(data, 18);
  const auto boundaries = load<std::uint64_t>(data, 26);
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
  if (load<std::int64_t>(data, document_index) != 0 ||
      load<std::uint64_t>(data, document_index + header.documents * 8) != header.sequences)
    throw CorpusError(path + " is corrupt: its documents do not cover its sequences");
  return header;
}

}  // namespace detail

class CorpusReader {
 public:
  explicit CorpusReader(const std::string& prefix) : CorpusReader(prefix, MappedFile(prefix + ".idx")) {}

  const CorpusHeader& header() const { return header_; }

  // Copies tokens [first, first + count) of the concatenated documents, widened to 64 bits.
  void read(std::uint64_t first, std::uint64_t count, std::int64_t* out) const {
    if (first > header_.tokens || count > header_.tokens - first)
      throw std::out_of_range("tokens past the end of the corpus");
    const unsigned char* source = bin_.data() + first * header_.token_bytes;
    switch (header_.dtype_code) {
      case 1: return widen<std::uint8_t>(source, count, out);
      case 3: return widen<std::int16_t>(source, count, out);
      case 4: return widen<std::int32_t>(source, count, out);
      case 5: return widen<std::int64_t>(source, count, out);
      default: return widen<std::uint16_t>(source, count, out);
    }
  }

 private:
  CorpusReader(const std::string& prefix, const MappedFile& index)
      : header_(detail::check_index(prefix + ".idx", index)), bin_(prefix + ".bin") {
    if (bin_.size() % header_.token_bytes != 0)
      throw CorpusError(prefix + ".bin is truncated: its size is no multiple of the token size");
    header_.tokens = bin_.size() / header_.token_bytes;
    // Between its two ends the index is checked where it is used: reading it all would take minutes for 1e9 documents.
    const std::uint64_t offsets = CorpusHeader::kBytes + header_.sequences * 4;
    if (detail::load<std::int64_t>(index.data(), offsets) != 0)
      throw CorpusError(prefix + ".idx is corrupt: its first sequence is not at the start of " + prefix + ".bin");
    const std::uint64_t last = header_.sequences - 1;
    const auto length = detail::load<std::int32_t>(index.data(), CorpusHeader::kBytes + last * 4);
    const auto offset = detail::load<std::int64_t>(index.data(), offsets + last * 8);
    if (length < 0 || static_cast<std::uint64_t>(offset) > bin_.size() ||
        static_cast<std::uint64_t>(length) * header_.token_bytes != bin_.size() - static_cast<std::uint64_t>(offset))
      throw CorpusError(prefix + ".bin does not end where " + prefix + ".idx says: one of the two is truncated");
  }

  template <typename T>
  static void widen(const unsigned char* source, std::uint64_t count, std::int64_t* out) {
    for (std::uint64_t i = 0; i < count; ++i) out[i] = detail::load<T>(source, i * sizeof(T));
  }

  CorpusHeader header_;
  MappedFile bin_;
};

}  // namespace megatron_lpr
