// The files of a corpus, opened, and which part of them is read.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "documents.h"
#include "languages.h"
#include "permutation.h"
#include "reader.h"

namespace megatron_lpr {

struct CorpusSpec {
  std::string prefix;
  std::uint64_t stream;            // selects the corpus' permutations
  bool expanded;                   // its role in the mixture
  std::vector<std::int64_t> tags;  // of every token, or of each language of its sidecar: language + 1, minus: expanded
  bool sidecar;
  std::uint64_t documents;       // in its files, as the manifest says
  std::uint64_t tokens;          // the same
  std::uint64_t document_limit;  // a run of so many documents, at a keyed place, is all that is read; 0: no limit
  std::uint64_t token_limit;     // the same in tokens, from a document's start on; 0: no limit

  bool documents_limited() const { return document_limit != 0 && document_limit < documents; }
  bool tokens_limited() const { return !documents_limited() && token_limit != 0 && token_limit < tokens; }
};

struct CorpusFiles {
  static constexpr std::int64_t kClocks = 300;  // seconds that the clocks of hosts and file servers may be apart

  CorpusReader reader;
  std::optional<DocumentOffsets> documents;
  std::optional<LanguageRuns> languages;
  std::uint64_t first = 0;  // tokens that are read: [first, end)
  std::uint64_t end = 0;
  std::uint64_t first_document = 0;
  std::uint64_t documents_read = 0;

  // `place`, a keyed number, chooses where a part lies; `by_document`: documents will be looked up. Files that were written
  // after `known_at` (seconds since 1970) are refused: another corpus may have taken the place of the manifest's.
  CorpusFiles(const CorpusSpec& spec, std::uint64_t place, bool by_document, std::uint64_t vocab_size,
              std::int64_t known_at)
      : reader(spec.prefix, vocab_size) {
    const CorpusHeader& header = reader.header();
    if (header.tokens != spec.tokens || header.documents != spec.documents)
      throw CorpusError(spec.prefix + ".bin has " + std::to_string(header.tokens) + " tokens in " +
                        std::to_string(header.documents) + " documents, in the manifest it has " +
                        std::to_string(spec.tokens) + " in " + std::to_string(spec.documents) + "; preprocess it again");
    if (reader.modified() > known_at + kClocks)
      throw CorpusError(spec.prefix + ".bin was written after this run had read its manifest: start the run again");
    const bool limited = spec.documents_limited() || spec.tokens_limited();
    if (by_document || limited) documents.emplace(spec.prefix, header);
    if (spec.sidecar) languages.emplace(spec.prefix, header.tokens, spec.tags.size());
    end = header.tokens;
    documents_read = header.documents;
    if (spec.documents_limited()) {
      first_document = below(place, spec.documents - spec.document_limit + 1);
      documents_read = spec.document_limit;
      first = documents->start(first_document);
      end = documents->start(first_document + documents_read);
      if (end < first) documents->corrupt(first_document);
    } else if (spec.tokens_limited()) {
      first_document = documents->containing(below(place, spec.tokens - spec.token_limit + 1));
      first = documents->start(first_document);
      end = first + spec.token_limit;
      // It may lie before the token that was searched for above, and in a corrupt index then in an earlier document.
      const std::uint64_t last_document = documents->containing(end - 1);
      if (last_document < first_document) documents->corrupt(first_document);
      documents_read = last_document + 1 - first_document;
    }
  }
};

}  // namespace megatron_lpr
