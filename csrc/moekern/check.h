// Errors a caller can act on: which argument, what it has, what is allowed.
#pragma once
#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "moekern/tensor_view.h"

namespace moekern {

// Becomes Python's ValueError and TypeError.
struct ValueError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class Error = ValueError, class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) throw Error(text(parts...));
}

// Printed only when a check fails: building a string costs more than the whole check.
struct Shape {
  int64_t rows, cols;
};
inline std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "[" << s.rows << ", " << s.cols << "]";
}
inline bool operator==(const Shape& a, const Shape& b) { return a.rows == b.rows && a.cols == b.cols; }
inline Shape shape_of(const Matrix& m) { return {m.rows, m.cols}; }

struct StackShape {
  int64_t count;
  Shape matrix;
};
inline std::ostream& operator<<(std::ostream& out, const StackShape& s) {
  return out << "[" << s.count << ", " << s.matrix.rows << ", " << s.matrix.cols << "]";
}
inline bool operator==(const StackShape& a, const StackShape& b) { return a.count == b.count && a.matrix == b.matrix; }
inline StackShape shape_of(const Stack& s) { return {s.count, shape_of(s.matrix)}; }

// The bytes from the first element to the last, for finding overlaps.
struct Extent {
  const char* first;
  const char* last;
  explicit Extent(const Matrix& m) : first(m.data), last(m.data) {
    if (!m || m.rows == 0 || m.cols == 0) return;
    last = m.at(m.rows - 1, m.cols - 1) + size_of(m.dtype);
  }
  bool overlaps(const Extent& other) const { return first < other.last && other.first < last; }
};

// Whether two matrices share a byte. Columns of one buffer interleave without sharing any: row-major
// matrices of one pitch are apart when their rows lie side by side within it.
inline bool overlap(const Matrix& a, const Matrix& b) {
  if (!Extent(a).overlaps(Extent(b))) return false;
  if (a.col_stride != 1 || b.col_stride != 1) return true;
  const int64_t pitch_a = a.row_stride * size_of(a.dtype), pitch_b = b.row_stride * size_of(b.dtype);
  const int64_t pitch = a.rows > 1 ? pitch_a : pitch_b;
  if (pitch <= 0 || (b.rows > 1 && pitch_b != pitch)) return true;
  const int64_t width_a = a.cols * size_of(a.dtype), width_b = b.cols * size_of(b.dtype);
  const int64_t shift = ((b.data - a.data) % pitch + pitch) % pitch;  // of b's rows against a's
  return shift < width_a || shift + width_b > pitch;
}

// A matrix that has every element of a stack, and as few others as the strides allow.
inline Matrix hull(const Stack& s) {
  Matrix m = s.matrix;
  if (s.count == 0 || m.rows == 0 || m.cols == 0) {
    m.rows = 0;
  } else if (s.count == 1) {
    return m;
  } else if (m.rows == 1) {
    m.rows = s.count;
    m.row_stride = s.stride;
  } else if (m.row_stride > 0 && s.stride % m.row_stride == 0) {
    m.rows += (s.count - 1) * (s.stride / m.row_stride);
  } else {
    m.cols = 1 + (s.count - 1) * s.stride + (m.rows - 1) * m.row_stride + (m.cols - 1) * m.col_stride;
    m.rows = 1;
    m.col_stride = 1;
  }
  return m;
}

}  // namespace moekern
