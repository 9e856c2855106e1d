// Where the documents of a corpus begin, from its .idx file (reader.h); a few numbers are read for one, nothing is loaded.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

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
    return byte(first_sequence(document), document) / header_.token_bytes;
  }

  // First tokens of documents first, ..., first + count - 1, and the end of the last one. Here every sequence of theirs is
  // checked: that it begins where the one before it ends.
  std::vector<std::int64_t> boundaries(std::uint64_t first, std::uint64_t count) const {
    if (first >= size() || count > size() - first) throw std::out_of_range("documents past the end of the corpus");
    const std::uint64_t width = header_.token_bytes, bytes = header_.tokens * width;
    std::uint64_t sequence = first_sequence(first), place = byte(sequence, first);
    if (place % width != 0) corrupt(first);
    InOrder<std::uint64_t> next_documents(index_, documents() + (first + 1) * 8, documents() + (size() + 1) * 8);
    InOrder<std::int32_t> lengths(index_, CorpusHeader::kBytes + sequence * 4, offsets());
    InOrder<std::uint64_t> next_offsets(index_, offsets() + (sequence + 1) * 8, documents());
    std::vector<std::int64_t> tokens{static_cast<std::int64_t>(place / width)};
    tokens.reserve(count + 1);
    for (std::uint64_t document = first; document < first + count; ++document) {
      const std::uint64_t next = next_documents.next();
      if (next < sequence || next > header_.sequences) corrupt(document);
      for (; sequence < next; ++sequence) {
        const std::int32_t length = lengths.next();
        const std::uint64_t end = sequence + 1 == header_.sequences ? bytes : next_offsets.next();
        if (length < 0 || end > bytes || end - place != static_cast<std::uint64_t>(length) * width) corrupt(document);
        place = end;
      }
      tokens.push_back(static_cast<std::int64_t>(place / width));
    }
    return tokens;
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
                      " lies outside the corpus, or out of order");
  }

 private:
  std::uint64_t offsets() const { return CorpusHeader::kBytes + header_.sequences * 4; }
  std::uint64_t documents() const { return CorpusHeader::kBytes + header_.sequences * 12; }

  // Of document size(): the number of sequences.
  std::uint64_t first_sequence(std::uint64_t document) const {
    const auto sequence = load<std::uint64_t>(index_, documents() + document * 8);
    if (sequence > header_.sequences) corrupt(document);
    return sequence;
  }

  // Where a document that begins with this sequence begins in the .bin file.
  std::uint64_t byte(std::uint64_t sequence, std::uint64_t document) const {
    if (sequence == header_.sequences) return header_.tokens * header_.token_bytes;
    const auto place = load<std::uint64_t>(index_, offsets() + sequence * 8);
    if (place > header_.tokens * header_.token_bytes) corrupt(document);
    return place;
  }

  File index_;
  CorpusHeader header_;
};

}  // namespace megatron_lpr
