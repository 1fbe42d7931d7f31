// Whether a module and all modules in it are as they were, but for the numbers in their tensors. The same question in Python
// takes 20 us for a block of ten modules, and 60 right after kernels that have filled the caches: as long as the block itself.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace sparseprop {
namespace {

namespace py = pybind11;

// What a call gave, as a number; false if it raised.
bool number(PyObject* result, unsigned long long& value) {
  if (result == nullptr) {
    PyErr_Clear();
    return false;
  }
  value = PyLong_AsUnsignedLongLongMask(result);
  Py_DECREF(result);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

bool is_a(PyObject* value, py::handle type) {
  const int answer = PyObject_IsInstance(value, type.ptr());
  if (answer < 0) PyErr_Clear();
  return answer == 1;
}

// Hooks that no forward pass calls, and what is said of hooks besides: a quarter of all objects.
bool matters(PyObject* key) {
  if (!PyUnicode_Check(key)) return true;
  const char* const name = PyUnicode_AsUTF8(key);
  if (name == nullptr) return PyErr_Clear(), true;
  return !std::strstr(name, "state_dict_") && !std::strstr(name, "_hooks_");
}

// The memory that a look at some objects will touch. By the next look, kernels have driven it from the caches, and objects lead from
// one to the other: asked for at once, their lines come side by side.
class Lines {
 public:
  void add(const void* begin, size_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(begin) / 64, last = (reinterpret_cast<uintptr_t>(begin) + bytes - 1) / 64;
    for (uintptr_t line = first; begin && bytes > 0 && line <= last; ++line) lines_.push_back(line * 64);
  }
  void add_dict(PyObject* object) {
    const auto* dict = reinterpret_cast<const PyDictObject*>(object);
    const auto entries = static_cast<size_t>(PyDict_Size(object));
    add(dict, sizeof(PyDictObject));
    add(dict->ma_keys, 32 + 2 * entries + 24 * entries);  // a header, indices, keys with their hashes and values
    add(dict->ma_values, entries * sizeof(PyObject*));
  }
  // Of a tensor also what its object points to.
  void add_tensor(PyObject* tensor) {
    const auto size = static_cast<size_t>(Py_TYPE(tensor)->tp_basicsize);
    add(tensor, size);
    for (size_t at = sizeof(PyObject); at + sizeof(void*) <= size; at += sizeof(void*)) {
      const void* word;
      std::memcpy(&word, reinterpret_cast<const char*>(tensor) + at, sizeof(word));
      if (reinterpret_cast<uintptr_t>(word) > 4096) add(word, 192);  // whatever it is: asking never fails
    }
  }
  void sort() {
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
  }
  void ask() const {
    for (const uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line));
  }

 private:
  std::vector<uintptr_t> lines_;
};

// Where a tensor's elements lie, how many bytes they take and whether they are in order; or of integers, which are read ahead of time, how often they
// were written to. Each question is a call of torch, most of what a look takes.
class TensorFacts {
 public:
  explicit TensorFacts(py::handle tensor) : tensor_(tensor) {
    unsigned long long floating = 0, dims = 0;
    known_ = number(PyObject_CallMethod(tensor.ptr(), "is_floating_point", nullptr), floating) && address(address_) && bytes(bytes_) && in_order(in_order_);
    counted_ = !floating && version(version_);
    ordered_ = number(PyObject_CallMethod(tensor.ptr(), "dim", nullptr), dims) && dims > 1;  // rows that may be transposed
  }
  bool hold() const {
    unsigned long long now;
    if (counted_) return known_ && version(now) && now == version_;
    return known_ && address(now) && now == address_ && bytes(now) && now == bytes_ && (!ordered_ || (in_order(now) && now == in_order_));
  }

 private:
  bool address(unsigned long long& value) const {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    return number(PyObject_CallMethodNoArgs(tensor_.ptr(), name), value);
  }
  bool bytes(unsigned long long& value) const {
    static PyObject* const name = PyUnicode_InternFromString("nbytes");
    return number(PyObject_GetAttr(tensor_.ptr(), name), value);
  }
  bool in_order(unsigned long long& value) const {
    static PyObject* const name = PyUnicode_InternFromString("is_contiguous");
    return number(PyObject_CallMethodNoArgs(tensor_.ptr(), name), value);
  }
  bool version(unsigned long long& value) const {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    return number(PyObject_GetAttr(tensor_.ptr(), name), value);
  }

  py::handle tensor_;  // whoever made this keeps it
  bool counted_ = false, known_ = false, ordered_ = false;
  unsigned long long address_ = 0, bytes_ = 0, in_order_ = 0, version_ = 0;
};

class ModuleFacts;

// Keys and values of a dict, in order. Plain values and tensors are kept, so that no other can take their address; not what
// might hold the module that this belongs to. Of modules the children alone are looked into: an attribute may lead back.
class DictFacts {
 public:
  enum class Kind { attributes, children, other };
  DictFacts(PyObject* dict, py::handle tensor_type, py::handle module_type, Kind kind, Lines& lines);
  bool hold(PyObject* dict) const;
  void add_own(Lines& lines) const;  // the memory that these facts are in

 private:
  struct Entry {
    PyObject *key, *value;
    std::unique_ptr<DictFacts> dict;
    std::unique_ptr<ModuleFacts> module;
  };
  std::vector<Entry> entries_;
  std::vector<py::object> kept_;
  std::vector<TensorFacts> tensors_;
};

class ModuleFacts {
 public:
  ModuleFacts(py::handle module, py::handle tensor_type, py::handle module_type, Lines& lines)
      : type_(Py_TYPE(module.ptr())), attributes_(attributes_of(module.ptr()).ptr(), tensor_type, module_type, DictFacts::Kind::attributes, lines) {
    lines.add(module.ptr(), static_cast<size_t>(Py_TYPE(module.ptr())->tp_basicsize));
  }
  void add_own(Lines& lines) const {
    lines.add(this, sizeof(*this));
    attributes_.add_own(lines);
  }
  bool hold(PyObject* module) const { return Py_TYPE(module) == type_ && attributes_.hold(attributes_of(module).ptr()); }

 private:
  static py::object attributes_of(PyObject* module) {
    return py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  }

  PyTypeObject* type_;
  DictFacts attributes_;
};

DictFacts::DictFacts(PyObject* dict, py::handle tensor_type, py::handle module_type, Kind kind, Lines& lines) {
  if (dict == nullptr) throw py::error_already_set();
  lines.add_dict(dict);
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
    Entry entry{key, value, nullptr, nullptr};
    kept_.push_back(py::reinterpret_borrow<py::object>(key));
    if (kind == Kind::children && is_a(value, module_type)) {
      entry.module = std::make_unique<ModuleFacts>(value, tensor_type, module_type, lines);
    } else if (kind == Kind::attributes && PyDict_Check(value) && matters(key)) {
      const bool children = PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, "_modules") == 0;
      entry.dict = std::make_unique<DictFacts>(value, tensor_type, module_type, children ? Kind::children : Kind::other, lines);
    } else if (is_a(value, tensor_type)) {
      kept_.push_back(py::reinterpret_borrow<py::object>(value));
      tensors_.emplace_back(value);
      lines.add_tensor(value);
    } else if (PyFloat_Check(value) || PyLong_Check(value) || PyUnicode_Check(value) || PyTuple_Check(value)) {
      kept_.push_back(py::reinterpret_borrow<py::object>(value));
    }
    entries_.push_back(std::move(entry));
  }
}

bool DictFacts::hold(PyObject* dict) const {
  if (dict == nullptr || !PyDict_Check(dict) || PyDict_Size(dict) != static_cast<Py_ssize_t>(entries_.size())) return false;
  PyObject *key, *value;
  Py_ssize_t at = 0;
  for (const Entry& entry : entries_) {
    if (!PyDict_Next(dict, &at, &key, &value) || key != entry.key || value != entry.value) return false;
    if (entry.dict && !entry.dict->hold(value)) return false;
    if (entry.module && !entry.module->hold(value)) return false;
  }
  for (const TensorFacts& tensor : tensors_)
    if (!tensor.hold()) return false;
  return true;
}

void DictFacts::add_own(Lines& lines) const {
  lines.add(this, sizeof(*this));
  lines.add(entries_.data(), entries_.size() * sizeof(Entry));
  lines.add(tensors_.data(), tensors_.size() * sizeof(TensorFacts));
  for (const Entry& entry : entries_) {
    if (entry.dict) entry.dict->add_own(lines);
    if (entry.module) entry.module->add_own(lines);
  }
}

class ModuleWatch {
 public:
  explicit ModuleWatch(py::handle module)
      : module_(module.ptr()), facts_(module, py::module_::import("torch").attr("Tensor"), py::module_::import("torch.nn").attr("Module"), lines_) {
    facts_.add_own(lines_);
    lines_.sort();
  }
  bool holds(py::handle module) const {
    if (module.ptr() != module_) return false;
    lines_.ask();
    return facts_.hold(module.ptr());
  }

 private:
  const PyObject* module_;  // not kept: compared only
  Lines lines_;
  ModuleFacts facts_;
};

}  // namespace
}  // namespace sparseprop

void bind_watch(pybind11::module_& m) {
  namespace py = pybind11;
  using sparseprop::ModuleWatch;
  py::class_<ModuleWatch>(m, "ModuleWatch").def(py::init<py::handle>(), py::arg("module")).def("holds", &ModuleWatch::holds, py::arg("module"));
}
