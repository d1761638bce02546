// Max pooling of planes: the maximum of each window, and where it is, a vector of neighbouring windows at a time. Of
// equal values the first is taken, and NaN before all others, as torch does. Rows have margins of −∞, which is never
// taken.

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
struct MaxPool {
  using T = Compute<In>;

  explicit MaxPool(const MaxPoolCall& c) : call(c) {}

  void run() const {
    // Some 16,000 entries of x to a task.
    const int64_t plane = call.S[0] * call.S[1], together = plane < 16384 ? 16384 / plane : 1;
    share(
        *call.runtime, (call.planes + together - 1) / together,
        [&](Carver& c) {
          return Memory{c.take<T>(call.S[0] * ld), c.take<T>(round_up<T>(Q)), c.take<T>(round_up<T>(Q))};
        },
        [&](const Memory& m) { begin(m); },
        [&](int64_t task, const Memory& m) {
          const int64_t end = (task + 1) * together < call.planes ? (task + 1) * together : call.planes;
          for (int64_t p = task * together; p < end; ++p) one_plane(p, m);
        });
  }

 private:
  struct Memory {
    T* x;           // [S0, ld]
    T *start, *at;  // [Q] in a window: the first column that is inside of the plane, and the maximum
  };

  static constexpr int64_t n = kLanes<T>;
  const MaxPoolCall& call;
  const int64_t W = call.S[1], Q = call.P[1];
  // Of a row: itself with its margin, and what vectors of windows reach.
  const int64_t row = call.padding[1] + W;
  const int64_t reach = (round_up<T>(Q) - 1) * call.stride[1] + (call.kernel[1] - 1) * call.dilation[1] + 2 * n;
  const int64_t ld = round_up<T>(row > reach ? row : reach);

  // How many steps of `dilation` lead from a corner to the first entry inside.
  static int64_t steps_in(int64_t corner, int64_t dilation) {
    return corner < 0 ? (-corner + dilation - 1) / dilation : 0;
  }

  void begin(const Memory& m) const {
    for (int64_t i = 0; i < call.S[0] * ld; ++i) m.x[i] = -__builtin_inff();
    for (int64_t j = 0; j < round_up<T>(Q); ++j)
      m.start[j] = static_cast<T>(steps_in(j * call.stride[1] - call.padding[1], call.dilation[1]) * call.dilation[1]);
  }

  void one_plane(int64_t p, const Memory& m) const {
    const In* x = static_cast<const In*>(call.x) + p * call.S[0] * W;
    In* y = static_cast<In*>(call.y) + p * call.P[0] * Q;
    int64_t* index = static_cast<int64_t*>(call.index) + p * call.P[0] * Q;
    for (int64_t r = 0; r < call.S[0]; ++r) copy_row(x + r * W, m.x + r * ld + call.padding[1], W);
    for (int64_t i = 0; i < call.P[0]; ++i, y += Q, index += Q) {
      const int64_t top = i * call.stride[0] - call.padding[0];
      if (call.stride[1] == 1)
        row_of_windows<1>(top, y, m);
      else if (call.stride[1] == 2)
        row_of_windows<2>(top, y, m);
      else
        row_of_windows<0>(top, y, m);
      const int64_t corner = top * W - call.padding[1];
      for (int64_t j = 0; j < Q; ++j) index[j] = corner + j * call.stride[1] + static_cast<int64_t>(m.at[j]);
    }
  }

  // Places are counted from a window's corner, in the compute type: all of them are small.
  template <int kStride>
  void row_of_windows(int64_t top, In* y, const Memory& m) const {
    const int64_t first = steps_in(top, call.dilation[0]), stride = kStride > 0 ? kStride : call.stride[1];
    const T above = static_cast<T>(first * call.dilation[0] * W);
    for (int64_t j = 0; j < Q; j += n) {
      Vector<T> best = Vector<T>{} - static_cast<T>(__builtin_inff()), at = load<T>(m.start + j) + above;
      for (int64_t k = first; k < call.kernel[0]; ++k) {
        const int64_t r = top + k * call.dilation[0];
        if (r >= call.S[0]) break;
        for (int64_t l = 0; l < call.kernel[1]; ++l) {
          const Vector<T> v = every<kStride>(m.x + r * ld + j * stride + l * call.dilation[1]);
          const auto take = (v > best) | (v != v);
          best = take ? v : best;
          at = take ? Vector<T>{} + static_cast<T>(k * call.dilation[0] * W + l * call.dilation[1]) : at;
        }
      }
      store<T>(m.at + j, at);
      if (j + n <= Q)
        store_narrow(y + j, best);
      else
        for (int64_t i = 0; i < Q - j; ++i) narrow(best[i], y[j + i]);
    }
  }

  // A vector of every stride-th entry.
  template <int kStride>
  BOOTGRAD_INLINE Vector<T> every(const T* p) const {
    if constexpr (kStride == 1) return load<T>(p);
    if constexpr (kStride == 2) return evens(load<T>(p), load<T>(p + n), typename LanesUpTo<n>::type{});
    Vector<T> v;
    for (int64_t i = 0; i < n; ++i) v[i] = p[i * call.stride[1]];
    return v;
  }
  template <int... I>
  static BOOTGRAD_INLINE Vector<T> evens(const Vector<T>& a, const Vector<T>& b, Lanes<I...>) {
    return __builtin_shufflevector(a, b, (2 * I)...);
  }
};

// Both adjoints, a plane at a time, so that zeros are written where they will be added to.
template <class In>
struct MaxPoolGrad {
  using T = Compute<In>;

  explicit MaxPoolGrad(const MaxPoolGradCall& c) : call(c) {}

  // False where an index is out of its plane.
  bool run() const {
    const int64_t plane = size > windows ? size : windows, together = 16384 / (plane + 1) + 1;
    int wrong = 0;
    share(
        *call.runtime, (call.planes + together - 1) / together,
        [&](Carver& c) { return Memory{c.take<T>(windows), c.take<T>(size)}; }, [](const Memory&) {},
        [&](int64_t task, const Memory& m) {
          const int64_t end = (task + 1) * together < call.planes ? (task + 1) * together : call.planes;
          for (int64_t p = task * together; p < end; ++p)
            if (!(call.gather ? gather(p, m) : scatter(p, m))) __atomic_store_n(&wrong, 1, __ATOMIC_RELAXED);
        });
    return wrong == 0;
  }

 private:
  struct Memory {
    T *values, *sum;  // [windows], [size]
  };

  const MaxPoolGradCall& call;
  const int64_t size = call.size, windows = call.windows;

  bool inside(const int64_t* index) const {
    uint64_t largest = 0;
    for (int64_t j = 0; j < windows; ++j) {
      const uint64_t at = static_cast<uint64_t>(index[j]);
      largest = at > largest ? at : largest;
    }
    return windows == 0 || largest < static_cast<uint64_t>(size);
  }

  // to[j] = from[j], zero where nothing passes
  template <class From, class To>
  void pass(const From* from, int64_t p, To* to) const {
    if (!call.blocked) return copy_rows(from, windows, 1, windows, to, windows, T(1));
    const bool* blocked = call.blocked + p * windows;
    for (int64_t j = 0; j < windows; ++j) narrow(blocked[j] ? T(0) : widen(from[j]), to[j]);
  }

  bool scatter(int64_t p, const Memory& m) const {
    const int64_t* index = call.index + p * windows;
    if (!inside(index)) return false;
    In* out = static_cast<In*>(call.out) + p * size;
    T* sum = m.sum;
    if constexpr (sizeof(In) == sizeof(T)) sum = out;
    pass(static_cast<const In*>(call.in) + p * windows, p, m.values);
    clear(sum, size);
    for (int64_t j = 0; j < windows; ++j) sum[index[j]] += m.values[j];
    if constexpr (sizeof(In) != sizeof(T)) copy_rows(sum, size, 1, size, out, size, T(1));
    return true;
  }

  bool gather(int64_t p, const Memory& m) const {
    const int64_t* index = call.index + p * windows;
    if (!inside(index)) return false;
    const In* in = static_cast<const In*>(call.in) + p * size;
    for (int64_t j = 0; j < windows; ++j) m.values[j] = widen(in[index[j]]);
    pass(m.values, p, static_cast<In*>(call.out) + p * windows);
    return true;
  }
};

inline bool max_pool_grad(const MaxPoolGradCall& call) {
  switch (call.dtype) {
    case DType::f32: return MaxPoolGrad<float>(call).run();
    case DType::f64: return MaxPoolGrad<double>(call).run();
    case DType::bf16: return MaxPoolGrad<bf16>(call).run();
    case DType::f16: return MaxPoolGrad<f16>(call).run();
  }
  return false;
}

inline void max_pool(const MaxPoolCall& call) {
  switch (call.dtype) {
    case DType::f32: return MaxPool<float>(call).run();
    case DType::f64: return MaxPool<double>(call).run();
    case DType::bf16: return MaxPool<bf16>(call).run();
    case DType::f16: return MaxPool<f16>(call).run();
  }
}

}  // namespace bootgrad::BOOTGRAD_ISA
