// Vectors of one instruction set, and transposition: compiled once per instruction set, inside its namespace.
//
// The including file defines BOOTGRAD_ISA (the namespace) and BOOTGRAD_VECTOR_BYTES, and has included the standard
// headers before it switched the instruction set on. No template or inline function of the standard library is used
// below, so that the linker cannot pick a copy of one that the machine lacks the instructions for.

namespace bootgrad::BOOTGRAD_ISA {

#define BOOTGRAD_INLINE inline __attribute__((always_inline))

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(BOOTGRAD_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(BOOTGRAD_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = BOOTGRAD_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));

template <class T>
BOOTGRAD_INLINE int64_t round_up(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

BOOTGRAD_INLINE uint32_t bits_of(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

BOOTGRAD_INLINE float float_of(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

// The type in which values of a storage type are computed.
template <class In>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class In>
using Compute = typename ComputeOf<In>::type;

BOOTGRAD_INLINE float widen(float v) { return v; }
BOOTGRAD_INLINE double widen(double v) { return v; }
BOOTGRAD_INLINE float widen(bf16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }
BOOTGRAD_INLINE float widen(f16 v) {
  // Moving the exponent by a multiplication makes subnormals right too; infinities and NaNs then need theirs restored.
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const float scaled = float_of(static_cast<uint32_t>(v.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = scaled >= 65536.0f ? 0x7f800000u : 0u;
  return float_of(bits_of(scaled) | special | sign);
}

BOOTGRAD_INLINE void narrow(float v, float& out) { out = v; }
BOOTGRAD_INLINE void narrow(double v, double& out) { out = v; }
BOOTGRAD_INLINE void narrow(float v, bf16& out) {
  const uint32_t u = bits_of(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
BOOTGRAD_INLINE void narrow(float v, f16& out) {
  const uint32_t u = bits_of(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // rounds to a multiple of 2^-24
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t value = magnitude >= 0x47800000u ? large : magnitude < 0x38800000u ? small : normal;
  out.bits = static_cast<uint16_t>(sign | value);
}

template <class T>
BOOTGRAD_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
BOOTGRAD_INLINE void store(T* p, const Vector<T>& v) {
  __builtin_memcpy(p, &v, sizeof v);
}

BOOTGRAD_INLINE Vector<float> load_wide(const float* p) { return load<float>(p); }
BOOTGRAD_INLINE Vector<double> load_wide(const double* p) { return load<double>(p); }
template <class In>
BOOTGRAD_INLINE Vector<float> load_wide(const In* p) {
  alignas(BOOTGRAD_VECTOR_BYTES) float wide[kLanes<float>];
  for (int64_t i = 0; i < kLanes<float>; ++i) wide[i] = widen(p[i]);
  return load<float>(wide);
}

template <class In>
BOOTGRAD_INLINE void store_narrow(In* p, const Vector<float>& v) {
  alignas(BOOTGRAD_VECTOR_BYTES) float wide[kLanes<float>];
  store<float>(wide, v);
  for (int64_t i = 0; i < kLanes<float>; ++i) narrow(wide[i], p[i]);
}
BOOTGRAD_INLINE void store_narrow(float* p, const Vector<float>& v) { store<float>(p, v); }
BOOTGRAD_INLINE void store_narrow(double* p, const Vector<double>& v) { store<double>(p, v); }

// The first n lanes only.
template <class T>
BOOTGRAD_INLINE void store_some(T* p, const Vector<T>& v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

template <int... I>
struct Lanes {};
template <int N, int... I>
struct LanesUpTo : LanesUpTo<N - 1, N - 1, I...> {};
template <int... I>
struct LanesUpTo<0, I...> {
  using type = Lanes<I...>;
};

template <int by, class V, int... I>
BOOTGRAD_INLINE V rotate(const V& v, Lanes<I...>) {
  return __builtin_shufflevector(v, v, ((I + by) % static_cast<int>(sizeof...(I)))...);
}

template <class T, int half = static_cast<int>(kLanes<T> / 2)>
BOOTGRAD_INLINE T sum_of_lanes(const Vector<T>& v) {
  if constexpr (half == 0)
    return v[0];
  else
    return sum_of_lanes<T, half / 2>(v + rotate<half>(v, typename LanesUpTo<kLanes<T>>::type()));
}

template <class V, int... I>
BOOTGRAD_INLINE void interleave(const V& a, const V& b, V& low, V& high, Lanes<I...>) {
  constexpr int n = sizeof...(I);
  low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * n)...);
  high = __builtin_shufflevector(a, b, (n / 2 + I / 2 + I % 2 * n)...);
}

// Transposes a square of vectors in registers: log2(n) rounds, each interleaving the upper half with the lower.
template <class T>
BOOTGRAD_INLINE void transpose_square(Vector<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  typename LanesUpTo<n>::type lanes;
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vector<T> next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) interleave(rows[i], rows[i + n / 2], next[2 * i], next[2 * i + 1], lanes);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// out[c·ld_out + r] = factor · in[r·ld_in + c]; one of the two types is the compute type T. Squares follow one another
// along the longer side, where memory is read or written in a few long streams.
template <class T, class In, class Out>
void transpose(const In* in, int64_t ld_in, int64_t rows, int64_t columns, Out* out, int64_t ld_out, T factor) {
  constexpr int64_t n = kLanes<T>;
  const int64_t full_rows = rows / n * n, full_columns = columns / n * n;
  const auto square = [&](int64_t r, int64_t c) __attribute__((always_inline)) {
    Vector<T> v[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) v[i] = load_wide(in + (r + i) * ld_in + c);
    transpose_square<T>(v);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) store_narrow(out + (c + i) * ld_out + r, v[i] * factor);
  };
  const bool tall = rows > columns;
  const int64_t outer = tall ? full_columns : full_rows, inner = tall ? full_rows : full_columns;
  for (int64_t a = 0; a < outer; a += n)
    for (int64_t b = 0; b < inner; b += n) square(tall ? b : a, tall ? a : b);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < full_columns ? full_rows : 0; r < rows; ++r)
      narrow(static_cast<T>(widen(in[r * ld_in + c])) * factor, out[c * ld_out + r]);
}

}  // namespace bootgrad::BOOTGRAD_ISA
