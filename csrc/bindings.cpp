// Python module megatron_lpr._replay_sampler: the sampler of sampler.h over NumPy buffers, without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "permutation.h"
#include "reader.h"
#include "sampler.h"

namespace py = pybind11;
namespace lpr = megatron_lpr;

namespace {

using CorpusTuple = std::tuple<std::string, std::uint64_t, bool, std::int64_t, std::uint64_t>;

lpr::Sampler make_sampler(const std::vector<CorpusTuple>& corpora, std::uint64_t seq_length, std::uint64_t seed,
                          std::int64_t eod_id, std::uint64_t numerator, std::uint64_t denominator) {
  std::vector<lpr::CorpusSpec> specs;
  for (const auto& [prefix, stream, expanded, tag, weight] : corpora)
    specs.push_back({prefix, stream, expanded, tag, weight});
  return {specs, seq_length, seed, eod_id, lpr::RoleSplit(numerator, denominator)};
}

template <typename T>
T* rows(py::array_t<T, py::array::c_style>& array, std::uint64_t count, std::uint64_t seq_length) {
  if (array.ndim() != 2 || static_cast<std::uint64_t>(array.shape(0)) != count ||
      static_cast<std::uint64_t>(array.shape(1)) != seq_length)
    throw std::invalid_argument("a batch buffer must have the shape [count, seq_length]");
  return array.mutable_data();
}

using Ids = py::array_t<std::int64_t, py::array::c_style>;
using Mask = py::array_t<float, py::array::c_style>;

void fill(const lpr::Sampler& sampler, std::uint64_t first, std::uint64_t count, Ids tokens, Ids labels,
          Mask loss_mask, Ids tags) {
  const std::uint64_t seq_length = sampler.seq_length();
  auto* tokens_data = rows(tokens, count, seq_length);
  auto* labels_data = rows(labels, count, seq_length);
  auto* mask_data = rows(loss_mask, count, seq_length);
  auto* tags_data = rows(tags, count, seq_length);
  const py::gil_scoped_release unlocked;
  sampler.fill(first, count, tokens_data, labels_data, mask_data, tags_data);
}

py::array_t<std::uint64_t> picks(const lpr::Sampler& sampler, std::uint64_t first, std::uint64_t count) {
  py::array_t<std::uint64_t> result({static_cast<py::ssize_t>(count), py::ssize_t{3}});
  std::uint64_t* out = result.mutable_data();
  const py::gil_scoped_release unlocked;
  for (std::uint64_t row = 0; row < count; ++row) {
    const lpr::Pick pick = sampler.pick(first + row);
    *out++ = pick.corpus;
    *out++ = pick.window;
    *out++ = pick.epoch;
  }
  return result;
}

py::array_t<std::uint64_t> permute(std::uint64_t size, std::uint64_t seed, std::uint64_t stream, std::uint64_t epoch,
                                   std::uint64_t first, std::uint64_t count) {
  py::array_t<std::uint64_t> result(static_cast<py::ssize_t>(count));
  std::uint64_t* out = result.mutable_data();
  const py::gil_scoped_release unlocked;
  const lpr::Permutation permutation(size, {seed, stream, epoch});
  for (std::uint64_t i = 0; i < count; ++i) out[i] = permutation(first + i);
  return result;
}

py::dict inspect(const std::string& prefix) {
  const lpr::CorpusHeader header = lpr::CorpusReader(prefix).header();
  py::dict result;
  result["dtype_code"] = header.dtype_code;
  result["sequences"] = header.sequences;
  result["documents"] = header.documents;
  result["tokens"] = header.tokens;
  return result;
}

}  // namespace

PYBIND11_MODULE(_replay_sampler, module) {
  module.doc() = "C++ core of megatron_lpr.data: keyed permutation, exact mixture, indexed corpora.";
  const py::object user_error = py::module_::import("megatron_lpr.errors").attr("UserError");
  py::register_exception<lpr::CorpusError>(module, "CorpusError", user_error);

  module.def("inspect", &inspect, py::arg("prefix"),
             "Checked sizes of a corpus: dtype_code, sequences, documents, tokens. Raises CorpusError.");
  module.def("permute", &permute, py::arg("size"), py::arg("seed"), py::arg("stream"), py::arg("epoch"),
             py::arg("first"), py::arg("count"),
             "Images of first, ..., first + count - 1 under the keyed permutation of range(size), uint64 [count].");

  py::class_<lpr::Sampler>(module, "Sampler")
      .def(py::init(&make_sampler), py::arg("corpora"), py::arg("seq_length"), py::arg("seed"), py::arg("eod_id"),
           py::arg("expanded_numerator"), py::arg("expanded_denominator"),
           "corpora: (prefix, stream, expanded, tag, weight) tuples; weights coprime within each role.")
      .def("num_windows", &lpr::Sampler::num_windows, py::arg("corpus"))
      .def("picks", &picks, py::arg("first"), py::arg("count"), "uint64 [count, 3]: corpus, window, epoch.")
      .def("fill", &fill, py::arg("first"), py::arg("count"), py::arg("tokens").noconvert(),
           py::arg("labels").noconvert(), py::arg("loss_mask").noconvert(), py::arg("tags").noconvert(),
           "Writes [count, seq_length] rows into int64 / int64 / float32 / int64 buffers.")
      .def("count", &lpr::Sampler::count, py::arg("first"), py::arg("count"),
           py::call_guard<py::gil_scoped_release>(), "Valid positions per corpus; reads no token.");
}
