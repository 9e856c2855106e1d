// Python module megatron_lpr._replay_sampler: the sampler of sampler.h over NumPy buffers, without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "documents.h"
#include "languages.h"
#include "permutation.h"
#include "prefetch.h"
#include "reader.h"
#include "sampler.h"

namespace py = pybind11;
namespace lpr = megatron_lpr;

namespace {

template <typename T>
using Rows = py::array_t<T, py::array::c_style>;

template <typename T>
T* rows(Rows<T>& array, std::uint64_t count, std::uint64_t seq_length) {
  if (array.ndim() != 2 || static_cast<std::uint64_t>(array.shape(0)) != count ||
      static_cast<std::uint64_t>(array.shape(1)) != seq_length)
    throw std::invalid_argument("a batch buffer must have the shape [count, seq_length]");
  return array.mutable_data();
}

void fill(const lpr::Sampler& sampler, std::uint64_t first, std::uint64_t count, Rows<std::int64_t> tokens,
          Rows<std::int64_t> labels, Rows<float> loss_mask, Rows<std::int64_t> tags,
          std::optional<Rows<std::int32_t>> documents) {
  if (documents.has_value() != sampler.document_ids())
    throw std::invalid_argument("a buffer for document numbers goes with a sampler that writes them");
  const std::uint64_t length = sampler.seq_length();
  const lpr::Row row{rows(tokens, count, length), rows(labels, count, length), rows(loss_mask, count, length),
                     rows(tags, count, length), documents ? rows(*documents, count, length) : nullptr};
  const py::gil_scoped_release unlocked;
  sampler.fill(first, count, row);
}

py::array_t<std::uint64_t> picks(const lpr::Sampler& sampler, std::uint64_t first, std::uint64_t count) {
  py::array_t<std::uint64_t> result({static_cast<py::ssize_t>(count), py::ssize_t{3}});
  std::uint64_t* out = result.mutable_data();
  const py::gil_scoped_release unlocked;
  sampler.for_each(first, count, [&](const lpr::Pick& pick) {
    *out++ = pick.corpus;
    *out++ = pick.window;
    *out++ = pick.epoch;
  });
  return result;
}

// (first token, tokens) of the one or two pieces of a corpus that a sample holds.
std::vector<std::pair<std::uint64_t, std::uint64_t>> spans(const lpr::Sampler& sampler, std::size_t corpus,
                                                           std::uint64_t window, std::uint64_t epoch) {
  const auto [head, tail] = sampler.corpus(corpus).spans(window, epoch);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> result{{head.first, head.count}};
  if (tail.count != 0) result.emplace_back(tail.first, tail.count);
  return result;
}

// (document, first token, tokens) of the documents that a sample holds, as far as it holds them.
std::vector<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>> documents(const lpr::Sampler& sampler,
                                                                               std::size_t corpus,
                                                                               std::uint64_t window,
                                                                               std::uint64_t epoch) {
  if (!sampler.document_ids()) throw std::invalid_argument("this sampler does not look documents up");
  std::vector<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>> result;
  const lpr::SampledCorpus& source = sampler.corpus(corpus);
  const auto [head, tail] = source.spans(window, epoch);
  for (const auto& span : {head, tail})
    source.for_each_document(span, [&](std::uint64_t document, std::uint64_t first, std::uint64_t count) {
      result.emplace_back(document, first, count);
    });
  return result;
}

// A NumPy array [count, seq_length] over one of a batch's buffers, which it keeps from being used again.
template <typename T>
py::array view(const std::shared_ptr<lpr::BatchBuffers>& batch, T* data, std::uint64_t count,
               std::uint64_t seq_length) {
  using Owner = std::shared_ptr<lpr::BatchBuffers>;
  py::capsule owner(new Owner(batch), [](void* pointer) { delete static_cast<Owner*>(pointer); });
  return py::array_t<T>({count, seq_length}, data, owner);
}

class PythonPrefetcher {
 public:
  PythonPrefetcher(std::shared_ptr<lpr::Sampler> sampler, std::uint64_t first, std::uint64_t count,
                   std::uint64_t stride, std::size_t depth, std::size_t threads)
      : count_(count),
        seq_length_(sampler->seq_length()),
        prefetcher_(new lpr::Prefetcher(std::move(sampler), first, count, stride, depth, threads)) {}
  ~PythonPrefetcher() {
    const py::gil_scoped_release unlocked;
    prefetcher_.reset();
  }

  py::tuple next() {
    std::shared_ptr<lpr::BatchBuffers> batch;
    {
      const py::gil_scoped_release unlocked;
      batch = prefetcher_->next();
    }
    const lpr::Row row = batch->row();
    const auto array = [&](auto* data) { return view(batch, data, count_, seq_length_); };
    py::object documents = py::none();
    if (row.documents != nullptr) documents = array(row.documents);
    return py::make_tuple(array(row.tokens), array(row.labels), array(row.loss_mask), array(row.tags), documents);
  }

 private:
  std::uint64_t count_;
  std::uint64_t seq_length_;
  std::unique_ptr<lpr::Prefetcher> prefetcher_;
};

py::array_t<std::uint64_t> permute(std::uint64_t size, std::uint64_t seed, std::uint64_t stream, std::uint64_t epoch,
                                   std::uint64_t first, std::uint64_t count, bool inverse) {
  py::array_t<std::uint64_t> result(static_cast<py::ssize_t>(count));
  std::uint64_t* out = result.mutable_data();
  const py::gil_scoped_release unlocked;
  const lpr::Permutation permutation(size, {seed, stream, epoch});
  for (std::uint64_t i = 0; i < count; ++i) out[i] = inverse ? permutation.inverse(first + i) : permutation(first + i);
  return result;
}

// A corpus' header and document boundaries.
struct Index {
  explicit Index(const std::string& prefix)
      : header(lpr::CorpusReader(prefix).header()), documents(prefix, header) {}

  lpr::CorpusHeader header;
  lpr::DocumentOffsets documents;
};

template <typename T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::array_t<std::int64_t> boundaries(const Index& index, std::uint64_t first, std::uint64_t count) {
  std::vector<std::int64_t> result;
  {
    const py::gil_scoped_release unlocked;
    result = index.documents.boundaries(first, count);
  }
  return array_of(result);
}

py::array_t<std::uint16_t> languages_of(const lpr::LanguageRuns& runs, std::uint64_t first, std::uint64_t count) {
  std::vector<std::uint16_t> result;
  {
    const py::gil_scoped_release unlocked;
    runs.for_each(first, count, [&](std::size_t language, std::uint64_t tokens) {
      result.insert(result.end(), tokens, static_cast<std::uint16_t>(language));
    });
  }
  return array_of(result);
}

// The files of a corpus, for readers other than the sampler. All raise CorpusError where a file is corrupt.
void define_files(py::module_& module) {
  py::class_<Index>(module, "Index")
      .def(py::init<const std::string&>(), py::arg("prefix"))
      .def_property_readonly("dtype_code", [](const Index& self) { return self.header.dtype_code; })
      .def_property_readonly("sequences", [](const Index& self) { return self.header.sequences; })
      .def_property_readonly("documents", [](const Index& self) { return self.header.documents; })
      .def_property_readonly("tokens", [](const Index& self) { return self.header.tokens; })
      .def("boundaries", &boundaries, py::arg("first"), py::arg("count"),
           "First tokens of documents first, ..., first + count - 1 and the last one's end: int64 [count + 1].");
  py::class_<lpr::LanguageRuns>(module, "LanguageRuns")
      .def(py::init<const std::string&, std::uint64_t, std::uint64_t>(), py::arg("prefix"), py::kw_only(),
           py::arg("num_tokens"), py::arg("num_languages"))
      .def_property_readonly("path", &lpr::LanguageRuns::path)
      .def("__len__", &lpr::LanguageRuns::size)
      .def("of_tokens", &languages_of, py::arg("first"), py::arg("count"),
           "Languages of tokens [first, first + count): uint16 [count].")
      .def("check", &lpr::LanguageRuns::check, py::call_guard<py::gil_scoped_release>(), "Reads every run.");
}

// What a sampler is made of; their fields are described in corpus.h, mixture.h and sampler.h.
void define_settings(py::module_& module) {
  py::class_<lpr::CorpusSpec>(module, "CorpusSpec")
      .def(py::init([](std::string prefix, std::uint64_t stream, bool expanded, std::vector<std::int64_t> tags,
                       bool sidecar, std::uint64_t documents, std::uint64_t tokens, std::uint64_t document_limit,
                       std::uint64_t token_limit) {
             return lpr::CorpusSpec{std::move(prefix), stream, expanded,       std::move(tags), sidecar,
                                    documents,         tokens, document_limit, token_limit};
           }),
           py::kw_only(), py::arg("prefix"), py::arg("stream"), py::arg("expanded"), py::arg("tags"),
           py::arg("sidecar"), py::arg("documents"), py::arg("tokens"), py::arg("document_limit"),
           py::arg("token_limit"));
  py::class_<lpr::MixtureSpec>(module, "MixtureSpec")
      .def(py::init([](std::uint64_t first_sample, std::uint64_t numerator, std::uint64_t denominator,
                       std::vector<std::uint64_t> weights) {
             return lpr::MixtureSpec{first_sample, lpr::Split(numerator, denominator), std::move(weights)};
           }),
           py::kw_only(), py::arg("first_sample"), py::arg("expanded_numerator"), py::arg("expanded_denominator"),
           py::arg("weights"));
  py::class_<lpr::SamplerSettings>(module, "SamplerSettings")
      .def(py::init([](std::uint64_t seq_length, bool one_document, bool shift_windows, std::uint64_t seed,
                       std::int64_t eod_id, std::uint64_t vocab_size, std::uint64_t num_languages,
                       bool document_ids) {
             return lpr::SamplerSettings{
                 {seq_length, one_document, shift_windows}, seed, eod_id, vocab_size, num_languages, document_ids};
           }),
           py::kw_only(), py::arg("seq_length"), py::arg("one_document"), py::arg("shift_windows"), py::arg("seed"),
           py::arg("eod_id"), py::arg("vocab_size"), py::arg("num_languages"), py::arg("document_ids"));
}

}  // namespace

PYBIND11_MODULE(_replay_sampler, module) {
  module.doc() = "C++ core of megatron_lpr.data: keyed permutation, mixture, indexed corpora.";
  const py::object user_error = py::module_::import("megatron_lpr.errors").attr("UserError");
  py::register_exception<lpr::CorpusError>(module, "CorpusError", user_error);

  define_files(module);
  module.def("permute", &permute, py::arg("size"), py::arg("seed"), py::arg("stream"), py::arg("epoch"),
             py::arg("first"), py::arg("count"), py::arg("inverse") = false,
             "Images of first, ..., first + count - 1 under the keyed permutation of range(size), uint64 [count].");

  define_settings(module);
  py::class_<lpr::Sampler, std::shared_ptr<lpr::Sampler>>(module, "Sampler")
      .def(py::init<const std::vector<lpr::CorpusSpec>&, const std::vector<lpr::MixtureSpec>&,
                    const lpr::SamplerSettings&>(),
           py::arg("corpora"), py::arg("mixtures"), py::arg("settings"), py::call_guard<py::gil_scoped_release>())
      .def("num_windows", [](const lpr::Sampler& self, std::size_t corpus) { return self.corpus(corpus).samples(); })
      .def("num_tokens", [](const lpr::Sampler& self, std::size_t corpus) { return self.corpus(corpus).tokens(); })
      .def("samples_before", &lpr::Sampler::samples_before, py::arg("k"), "Samples of each corpus among the first k.")
      .def("picks", &picks, py::arg("first"), py::arg("count"), "uint64 [count, 3]: corpus, window, epoch.")
      .def("spans", &spans, py::arg("corpus"), py::arg("window"), py::arg("epoch"))
      .def("documents", &documents, py::arg("corpus"), py::arg("window"), py::arg("epoch"))
      .def("fill", &fill, py::arg("first"), py::arg("count"), py::arg("tokens").noconvert(),
           py::arg("labels").noconvert(), py::arg("loss_mask").noconvert(), py::arg("tags").noconvert(),
           py::arg("documents").noconvert() = py::none(),
           "Writes [count, seq_length] rows into int64 / int64 / float32 / int64 / int32 buffers.")
      .def("count", &lpr::Sampler::count, py::arg("first"), py::arg("count"),
           py::call_guard<py::gil_scoped_release>(), "Valid positions per language; reads no token.");

  py::class_<PythonPrefetcher>(module, "Prefetcher")
      .def(py::init<std::shared_ptr<lpr::Sampler>, std::uint64_t, std::uint64_t, std::uint64_t, std::size_t,
                    std::size_t>(),
           py::arg("sampler"), py::arg("first"), py::arg("count"), py::arg("stride"), py::arg("depth"),
           py::arg("threads"), "Batches of samples first + i * stride, ..., + count - 1, read ahead by threads.")
      .def("next", &PythonPrefetcher::next, "tokens, labels, loss_mask, tags, documents (or None) of the next batch.");
}
