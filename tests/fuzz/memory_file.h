// Takes the place of csrc/file.h: files on the heap. Reading past the end of one is a bug of its reader and aborts; one
// that was cut short after it was opened is refused, as the real ones are.
#define MEGATRON_LPR_FILE_H

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "corpus_error.h"

namespace megatron_lpr {

using Bytes = std::vector<unsigned char>;
inline std::map<std::string, Bytes> files;

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

class File {
 public:
  explicit File(const std::string& path) : path_(path) {
    static std::uint64_t last = 0;
    id_ = ++last;
    if (files.count(path) == 0) throw CorpusError("cannot open " + path);
    size_ = files[path].size();
    if (size_ == 0) throw CorpusError(path + " is empty");
  }

  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }
  std::uint64_t id() const { return id_; }
  std::int64_t modified() const { return 0; }

  void read(std::uint64_t offset, std::uint64_t bytes, void* out) const {
    require(offset <= size_ && bytes <= size_ - offset, "a read past the end of a file");
    const Bytes& now = files.at(path_);
    if (offset + bytes > now.size()) throw CorpusError(path_ + " was cut short while it was read");
    std::memcpy(out, now.data() + offset, bytes);
  }

 private:
  std::string path_;
  std::uint64_t size_ = 0;
  std::uint64_t id_ = 0;
};

}  // namespace megatron_lpr
