#pragma once

#include <stdexcept>

namespace megatron_lpr {

// A corpus on disk that cannot be read; the message names the file.
class CorpusError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace megatron_lpr
