// A file that is read at places, by pread. Not by mmap: a mapped file that somebody cuts short, or whose file system
// fails, ends the process with SIGBUS; here both are an exception that names the file.
//
// A file stays open, unless there are so many that others of the process would find no descriptor left: those are
// opened for each read.
#ifndef MEGATRON_LPR_FILE_H  // tests/fuzz has another one
#define MEGATRON_LPR_FILE_H

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "corpus_error.h"

namespace megatron_lpr {

class File {
 public:
  explicit File(const std::string& path) : path_(path) {
    static std::atomic<std::uint64_t> last{0};
    id_ = ++last;
    Descriptor opened(path);
    struct stat status {};
    if (::fstat(opened.number, &status) != 0 || !S_ISREG(status.st_mode))
      throw CorpusError(path + " is not a regular file");
    if (status.st_size <= 0) throw CorpusError(path + " is empty");
    size_ = static_cast<std::uint64_t>(status.st_size);
    inode_ = status.st_ino;
    modified_ = static_cast<std::int64_t>(status.st_mtime);
    struct ::rlimit limit {};
    if (::getrlimit(RLIMIT_NOFILE, &limit) == 0 && static_cast<::rlim_t>(opened.number) < limit.rlim_cur / 2)
      kept_ = std::move(opened);
  }

  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }         // when it was opened
  std::int64_t modified() const { return modified_; }  // the same, in seconds since 1970
  std::uint64_t id() const { return id_; }             // of no other file in this process

  void read(std::uint64_t offset, std::uint64_t bytes, void* out) const {
    if (kept_.number >= 0) return read(kept_, offset, bytes, static_cast<unsigned char*>(out));
    const Descriptor opened(path_);
    struct stat status {};
    if (::fstat(opened.number, &status) != 0 || status.st_ino != inode_)
      throw CorpusError(path_ + " was replaced while it was read: start again");
    read(opened, offset, bytes, static_cast<unsigned char*>(out));
  }

 private:
  struct Descriptor {
    Descriptor() = default;
    explicit Descriptor(const std::string& path) : number(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
      if (number < 0) throw CorpusError("cannot open " + path + ": " + std::strerror(errno));
    }
    Descriptor(Descriptor&& other) noexcept : number(std::exchange(other.number, -1)) {}
    Descriptor& operator=(Descriptor&& other) noexcept {
      std::swap(number, other.number);
      return *this;
    }
    ~Descriptor() {
      if (number >= 0) ::close(number);
    }

    int number = -1;
  };

  void read(const Descriptor& opened, std::uint64_t offset, std::uint64_t bytes, unsigned char* out) const {
    while (bytes > 0) {
      const ::ssize_t got = ::pread(opened.number, out, bytes, static_cast<::off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw CorpusError("cannot read " + path_ + ": " + std::strerror(errno));
      if (got == 0)
        throw CorpusError(path_ + " was cut short while it was read: it had " + std::to_string(size_) +
                          " bytes; restore it and start again");
      out += got;
      offset += static_cast<std::uint64_t>(got);
      bytes -= static_cast<std::uint64_t>(got);
    }
  }

  std::string path_;
  Descriptor kept_;
  std::uint64_t size_ = 0;
  std::uint64_t id_ = 0;
  ::ino_t inode_ = 0;
  std::int64_t modified_ = 0;
};

}  // namespace megatron_lpr

#endif
