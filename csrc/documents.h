// Where the documents of a corpus begin, from its .idx file; a few numbers are read for one, nothing is loaded.
#pragma once

#include <cstdint>
#include <string>

#include "load.h"
#include "reader.h"

namespace megatron_lpr {

class DocumentOffsets {
 public:
  DocumentOffsets(const std::string& prefix, const CorpusHeader& header)
      : index_(prefix + ".idx"), header_(header) {
    const std::uint64_t needed = CorpusHeader::kBytes + header.sequences * 12 + (header.documents + 1) * 8;
    if (index_.size() < needed) throw CorpusError(index_.path() + " is truncated");
  }

  std::uint64_t size() const { return header_.documents; }

  // First token of a document; that of document size() is the corpus' number of tokens.
  std::uint64_t start(std::uint64_t document) const {
    if (document > header_.documents) throw std::out_of_range("document past the end of the corpus");
    if (document == header_.documents) return header_.tokens;
    const std::uint64_t boundaries = CorpusHeader::kBytes + header_.sequences * 12;
    const auto sequence = load<std::uint64_t>(index_, boundaries + document * 8);
    if (sequence > header_.sequences) corrupt(document);
    if (sequence == header_.sequences) return header_.tokens;
    const std::uint64_t offsets = CorpusHeader::kBytes + header_.sequences * 4;
    const auto token = load<std::uint64_t>(index_, offsets + sequence * 8) / header_.token_bytes;
    if (token > header_.tokens) corrupt(document);
    return token;
  }

  std::uint64_t length(std::uint64_t document) const {
    const std::uint64_t first = start(document), end = start(document + 1);
    if (end < first) corrupt(document);
    return end - first;
  }

  // The document that token belongs to.
  std::uint64_t containing(std::uint64_t token) const {
    std::uint64_t low = 0, high = header_.documents;  // start(low) <= token < start(high)
    while (high - low > 1) {
      const std::uint64_t middle = low + (high - low) / 2;
      (start(middle) <= token ? low : high) = middle;
    }
    return low;
  }

  [[noreturn]] void corrupt(std::uint64_t document) const {
    throw CorpusError(index_.path() + " is corrupt: document " + std::to_string(document) +
                      " lies outside the corpus, or ends before it begins");
  }

 private:
  File index_;
  CorpusHeader header_;
};

}  // namespace megatron_lpr
