// The language of every token of a corpus that mixes languages: the runs of its sidecar `prefix.lang`.
//
// Layout, little-endian: magic "LPRLANG1", number of runs R u64, first token u64[R] (strictly increasing from 0),
// language u16[R], an index into the order of the manifest entry's `languages`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "load.h"

namespace megatron_lpr {

class LanguageRuns {
 public:
  LanguageRuns(const std::string& prefix, std::uint64_t tokens, std::uint64_t languages)
      : file_(prefix + ".lang"), path_(file_.path()), tokens_(tokens), languages_(languages) {
    char magic[8] = {};
    file_.read(0, std::min<std::uint64_t>(sizeof(magic), file_.size()), magic);
    if (file_.size() < kHeader || std::memcmp(magic, "LPRLANG1", 8) != 0)
      throw CorpusError(path_ + " is not a language sidecar (bad magic)");
    runs_ = load<std::uint64_t>(file_, 8);
    if (runs_ == 0 || runs_ > (file_.size() - kHeader) / kRun || file_.size() != kHeader + runs_ * kRun)
      throw CorpusError(path_ + " has the wrong size for its number of runs: it is truncated or corrupt");
    if (first_token(0) != 0 || first_token(runs_ - 1) >= tokens_)
      throw CorpusError(path_ + " is corrupt: its runs do not cover the corpus");
  }

  const std::string& path() const { return path_; }
  std::uint64_t size() const { return runs_; }

  // Calls visit(language, tokens) for the runs of tokens [first, first + count), cut to them.
  template <typename Visit>
  void for_each(std::uint64_t first, std::uint64_t count, Visit&& visit) const {
    if (first > tokens_ || count > tokens_ - first) throw std::out_of_range("tokens past the end of the corpus");
    std::uint64_t low = 0, high = runs_;  // first_token(low) <= first < first_token(high)
    while (high - low > 1) {
      const std::uint64_t middle = low + (high - low) / 2;
      (first_token(middle) <= first ? low : high) = middle;
    }
    walk(low, first, first + count, visit);
  }

  // Reads every run; a search may miss one that is out of order.
  void check() const {
    walk(0, 0, tokens_, [](std::size_t, std::uint64_t) {});
  }

 private:
  static constexpr std::uint64_t kHeader = 16;
  static constexpr std::uint64_t kRun = 10;

  template <typename Visit>
  void walk(std::uint64_t run, std::uint64_t first, std::uint64_t end, Visit&& visit) const {
    for (; first < end; ++run) {
      const std::uint64_t run_end = run + 1 < runs_ ? first_token(run + 1) : tokens_;
      const std::uint64_t until = std::min(end, run_end);
      const auto language = load<std::uint16_t>(file_, kHeader + runs_ * 8 + run * 2);
      if (until <= first || run_end > tokens_ || language >= languages_)
        throw CorpusError(path_ + " is corrupt at run " + std::to_string(run));
      visit(language, until - first);
      first = until;
    }
  }

  std::uint64_t first_token(std::uint64_t run) const {
    return load<std::uint64_t>(file_, kHeader + run * 8);
  }

  File file_;
  std::string path_;
  std::uint64_t tokens_;
  std::uint64_t languages_;
  std::uint64_t runs_ = 0;
};

}  // namespace megatron_lpr
