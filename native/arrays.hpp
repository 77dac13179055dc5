// NumPy arrays as arguments and results, without the cost of a caster: a look at a buffer, an array made to be filled.
#pragma once
#include <nanobind/nanobind.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace flexkv {

namespace nb = nanobind;

// Raises an exception of flexkv_core.errors.
[[noreturn]] inline void raise(const char* type, const std::string& text) {
  nb::object kind = nb::module_::import_("flexkv_core.errors").attr(type);
  PyErr_SetString(kind.ptr(), text.c_str());
  throw nb::python_error();
}

// What str() makes of it.
inline std::string text_of(nb::handle object) {
  nb::object text = nb::steal(PyObject_Str(object.ptr()));
  if (!text.is_valid()) throw nb::python_error();
  return nb::cast<nb::str>(text).c_str();
}

inline std::string name_of_type(nb::handle object) { return Py_TYPE(object.ptr())->tp_name; }

// A read-only look at an array's bytes, one element behind the other.
class View {
 public:
  // `copied` makes a copy of an array whose elements do not lie so, or not at addresses for their type. Of an array of a
  // dtype that is no plain number, nothing is seen.
  View(nb::handle array, nb::handle copied) {
    look(array);
    const bool aligned = view_.itemsize == 0 || reinterpret_cast<uintptr_t>(view_.buf) % size_t(view_.itemsize) == 0;
    if (view_.obj == nullptr || view_.len > kMostBytes || (aligned && PyBuffer_IsContiguous(&view_, 'C') != 0)) return;
    const nb::object copy = copied(array);
    PyBuffer_Release(&view_);
    look(copy);
  }
  ~View() { PyBuffer_Release(&view_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  int dimensions() const { return view_.ndim; }
  Py_ssize_t size(int axis) const { return view_.shape[axis]; }
  bool holds(char code) const {
    return view_.format != nullptr && view_.format[0] == code && view_.format[1] == '\0';
  }
  bool holds_int64() const { return view_.itemsize == 8 && (holds('l') || holds('q')); }
  template <class T>
  T* data() const {
    return static_cast<T*>(view_.buf);
  }

 private:
  static constexpr Py_ssize_t kMostBytes = Py_ssize_t(32) * ((Py_ssize_t(1) << 31) - 2);  // more is refused, and so not copied

  void look(nb::handle array) {  // keeps the array alive
    if (PyObject_GetBuffer(array.ptr(), &view_, PyBUF_FORMAT | PyBUF_STRIDES) == 0) return;
    PyErr_Clear();
    view_ = Py_buffer{};
  }
  Py_buffer view_{};
};

struct NumPy {
  nb::object module = nb::module_::import_("numpy");
  nb::object array = module.attr("ndarray");
  nb::object empty = module.attr("empty");
  nb::object zeros = module.attr("zeros");
  nb::object copied = array.attr("copy");  // C-contiguous and aligned
  nb::object uint8 = module.attr("dtype")("uint8");
  nb::object int64 = module.attr("dtype")("int64");
  nb::object boolean = module.attr("dtype")("bool");

  bool is_array(nb::handle object) const { return PyObject_IsInstance(object.ptr(), array.ptr()) == 1; }

  template <class T>
  static T* data(nb::handle made) {  // of an array that was just made
    Py_buffer view;
    if (PyObject_GetBuffer(made.ptr(), &view, PyBUF_SIMPLE) != 0) throw nb::python_error();
    T* data = static_cast<T*>(view.buf);
    PyBuffer_Release(&view);
    return data;
  }
  template <class T>
  nb::object copy(const std::vector<T>& values, nb::handle dtype, size_t width = 0) const {
    nb::object made = width == 0 ? empty(values.size(), dtype)
                                 : empty(nb::make_tuple(values.size() / width, width), dtype);
    if (!values.empty()) std::memcpy(data<T>(made), values.data(), values.size() * sizeof(T));
    return made;
  }
};

}  // namespace flexkv
