// A whole file, read-only, by mmap. Pages are read when they are touched; a file cut short by someone else after it was
// opened ends the process with SIGBUS, as with every memory-mapped file.
#ifndef MEGATRON_LPR_MAPPED_FILE_H  // tests/fuzz has another one
#define MEGATRON_LPR_MAPPED_FILE_H

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "corpus_error.h"

namespace megatron_lpr {

class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) throw CorpusError("cannot open " + path + ": " + std::strerror(errno));
    struct stat status {};
    const bool regular = ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
    if (regular && status.st_size > 0) {
      size_ = static_cast<std::uint64_t>(status.st_size);
      data_ = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0);
    }
    const int error = errno;
    ::close(descriptor);
    if (!regular) throw CorpusError(path + " is not a regular file");
    if (size_ == 0) throw CorpusError(path + " is empty");
    if (data_ == MAP_FAILED) throw CorpusError("cannot map " + path + ": " + std::strerror(error));
  }
  MappedFile(MappedFile&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile() {
    if (size_ != 0) ::munmap(data_, size_);
  }

  const unsigned char* data() const { return static_cast<const unsigned char*>(data_); }
  std::uint64_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  std::uint64_t size_ = 0;
};

}  // namespace megatron_lpr

#endif
