// The one micro-kernel: C[m, n] = Σ_k a[row[m] + depth[k]] · b[k·ldb + n], handed to an epilogue while in registers.
//
// A is read by scalar broadcasts at the sum of two offsets, which covers patches, strides and plain matrices alike; B
// is contiguous in n, its rows padded with zeros to whole vectors. A tile is MR rows by NV vectors.

namespace bootgrad::BOOTGRAD_ISA {

template <class T>
struct Gathered {
  const T* base;
  const int64_t* row;
  const int64_t* depth;
};

// The same, and row k of B is b + b_row[k].
template <class T>
struct GatheredBoth : Gathered<T> {
  const int64_t* b_row;
};

template <class A>
constexpr bool kListsRows = false;
template <class T>
constexpr bool kListsRows<GatheredBoth<T>> = true;

// A longer sum is made in runs of this many terms, and of their sums, so that rounding errors do not pile up in one
// chain.
constexpr int64_t kRun = 512;

template <class T, int MR, int NV, class A, class Epilogue>
__attribute__((noinline)) void tile(const A& a, int64_t m0, int64_t mr, int64_t K, const T* b, int64_t ldb, int64_t n0,
                                    const Epilogue& epilogue) {
  constexpr int64_t n = kLanes<T>;
  const T* rows[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) rows[i] = a.base + a.row[m0 + (i < mr ? i : mr - 1)];
  Vector<T> acc[MR][NV], total[MR][NV];
  const auto each = [](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) body(i, j);
  };
  const int64_t* depth = a.depth;
  const int64_t* const end = depth + K;
  const int64_t* b_row = nullptr;
  if constexpr (kListsRows<A>) b_row = a.b_row;
  b += n0;
  for (bool first = true;; first = false) {
    each([&](int i, int j) { acc[i][j] = Vector<T>{}; });
    const int64_t* const stop = end - depth > kRun ? depth + kRun : end;
    for (; depth != stop; ++depth) {
      const T* row = b;
      if constexpr (kListsRows<A>)
        row += *b_row++;
      else
        b += ldb;
      Vector<T> bv[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) bv[j] = load<T>(row + j * n);
      const int64_t at = *depth;
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const T scalar = rows[i][at];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] += scalar * bv[j];
      }
    }
    if (!first) each([&](int i, int j) { acc[i][j] += total[i][j]; });
    if (depth == end) break;
    each([&](int i, int j) { total[i][j] = acc[i][j]; });
  }
  epilogue.template finish<MR, NV>(m0, mr, n0, acc);
}

// Largest tiles that keep the accumulators, one row of B and one broadcast in registers.
#if BOOTGRAD_VECTOR_BYTES == 64
constexpr int kMaxVectors = 4;
constexpr int kMaxRows[5] = {0, 9, 9, 8, 6};
#else
constexpr int kMaxVectors = 2;
constexpr int kMaxRows[5] = {0, 6, 6, 0, 0};
#endif

template <class T, int NV, class A, class Epilogue>
void slab(int64_t M, int64_t K, const A& a, const T* b, int64_t ldb, int64_t n0, const Epilogue& epilogue) {
  constexpr int max = kMaxRows[NV];
  constexpr int medium = max == 8 ? 4 : max == 9 ? 6 : 4;
  constexpr int small = max == 9 ? 3 : 2;
  for (int64_t m = 0; m < M;) {
    const int64_t left = M - m;
    if (left > medium) {
      const int64_t mr = left < max ? left : max;
      tile<T, max, NV>(a, m, mr, K, b, ldb, n0, epilogue);
      m += mr;
    } else if (left > small) {
      tile<T, medium, NV>(a, m, left, K, b, ldb, n0, epilogue);
      m += left;
    } else if (left > 1) {
      tile<T, small, NV>(a, m, left, K, b, ldb, n0, epilogue);
      m += left;
    } else {
      tile<T, 1, NV>(a, m, 1, K, b, ldb, n0, epilogue);
      m += 1;
    }
  }
}

// Columns beyond N, up to a whole vector, are zeros of B or left out by the epilogue. With `key`, ascending over the
// rows, a slab of columns that ends at n takes only the rows whose key is below n + slack: the upper triangle of a Gram
// matrix.
template <class T, class A, class Epilogue>
void gemm_of(int64_t M, int64_t N, int64_t K, const A& a, const T* b, int64_t ldb, const Epilogue& epilogue,
             const int64_t* key = nullptr, int64_t slack = 0) {
  const int64_t vectors = (N + kLanes<T> - 1) / kLanes<T>;
  const int64_t widest = key ? 2 : kMaxVectors, slabs = (vectors + widest - 1) / widest;
  int64_t v = 0, rows = key ? 0 : M;
  for (int64_t s = 0; s < slabs; ++s) {
    const int64_t count = (vectors - v + slabs - s - 1) / (slabs - s);
    const int64_t n0 = v * kLanes<T>;
    v += count;
    while (rows < M && key[rows] < v * kLanes<T> + slack) ++rows;
    switch (count) {
      case 1: slab<T, 1>(rows, K, a, b, ldb, n0, epilogue); break;
      case 2: slab<T, 2>(rows, K, a, b, ldb, n0, epilogue); break;
#if BOOTGRAD_VECTOR_BYTES == 64
      case 3: slab<T, 3>(rows, K, a, b, ldb, n0, epilogue); break;
      case 4: slab<T, 4>(rows, K, a, b, ldb, n0, epilogue); break;
#endif
    }
  }
}

template <class T, class Epilogue>
void gemm(int64_t M, int64_t N, int64_t K, const Gathered<T>& a, const T* b, int64_t ldb, const Epilogue& epilogue,
          const int64_t* key = nullptr, int64_t slack = 0) {
  gemm_of<T>(M, N, K, a, b, ldb, epilogue, key, slack);
}

// A sum over many tiles, one per lane, with its rounding errors kept beside it (Knuth's two-sum).
template <class T>
struct Total {
  Vector<T> sum{}, error{};
  BOOTGRAD_INLINE void add(const Vector<T>& v) {
    const Vector<T> next = sum + v, part = next - sum;
    error += (sum - (next - part)) + (v - part);
    sum = next;
  }
  BOOTGRAD_INLINE double value() const {
    double s = 0;
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      const bool finite = sum[i] - sum[i] == 0;  // else the error is NaN, from ∞ − ∞
      s += static_cast<double>(sum[i]) + (finite ? static_cast<double>(error[i]) : 0);
    }
    return s;
  }
};

// out[m, n] = factor · C[m, n], or added to what is there; row m goes to place[m] where a table is given.
template <class T>
struct Store {
  T* out;
  int64_t ld, columns;  // columns that exist: a last vector may be cut
  T factor;
  bool add;
  const int64_t* place;

  template <int MR, int NV>
  BOOTGRAD_INLINE void finish(int64_t m0, int64_t mr, int64_t n0, Vector<T> (&acc)[MR][NV]) const {
    constexpr int64_t n = kLanes<T>;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      if (i >= mr) continue;
      T* p = out + (place ? place[m0 + i] : m0 + i) * ld + n0;
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        Vector<T> v = acc[i][j] * factor;
        const int64_t left = columns - n0 - j * n;
        if (left >= n) {
          if (add) v += load<T>(p + j * n);
          store<T>(p + j * n, v);
        } else if (add) {
          for (int64_t l = 0; l < left; ++l) p[j * n + l] += v[l];
        } else {
          store_some<T>(p + j * n, v, left);
        }
      }
    }
  }
};

// Squares of a sample's gradient tile, with and without the center; adds the tile to a sum; keeps the deviation.
template <class T>
struct Norms {
  int64_t ld;
  const T* center;  // or null; like all below [rows, ld]
  T* sum;           // or null
  bool first;       // the sum holds nothing yet
  T* keep;          // or null: G − center
  Total<T>* plain;
  Total<T>* deviation;  // with a center

  template <int MR, int NV>
  BOOTGRAD_INLINE void finish(int64_t m0, int64_t mr, int64_t n0, Vector<T> (&acc)[MR][NV]) const {
    if (plain) plain->add(squares<MR, NV>(mr, acc));
    if (sum) {
      if (first)
        each<MR, NV>(m0, mr, n0, [&](int64_t at, int i, int j) { store<T>(sum + at, acc[i][j]); });
      else
        each<MR, NV>(m0, mr, n0, [&](int64_t at, int i, int j) { store<T>(sum + at, load<T>(sum + at) + acc[i][j]); });
    }
    if (center) {
      each<MR, NV>(m0, mr, n0, [&](int64_t at, int i, int j) { acc[i][j] -= load<T>(center + at); });
      deviation->add(squares<MR, NV>(mr, acc));
    }
    if (keep) each<MR, NV>(m0, mr, n0, [&](int64_t at, int i, int j) { store<T>(keep + at, acc[i][j]); });
  }

 private:
  template <int MR, int NV, class F>
  BOOTGRAD_INLINE void each(int64_t m0, int64_t mr, int64_t n0, F f) const {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      if (i < mr)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) f((m0 + i) * ld + n0 + j * kLanes<T>, i, j);
    }
  }

  template <int MR, int NV>
  static BOOTGRAD_INLINE Vector<T> squares(int64_t mr, const Vector<T> (&acc)[MR][NV]) {
    Vector<T> part[NV] = {};
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      if (i < mr)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) part[j] += acc[i][j] * acc[i][j];
    }
    Vector<T> s = part[0];
#pragma GCC unroll 4
    for (int j = 1; j < NV; ++j) s += part[j];
    return s;
  }
};

// Σ_{m,n} C[m, n] · other[m, n].
template <class T>
struct Dot {
  const T* other;  // zero where B's rows are padding
  int64_t ld;
  Total<T>* total;

  template <int MR, int NV>
  BOOTGRAD_INLINE void finish(int64_t m0, int64_t mr, int64_t n0, Vector<T> (&acc)[MR][NV]) const {
    Vector<T> s{};
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      if (i < mr)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) s += acc[i][j] * load<T>(other + (m0 + i) * ld + n0 + j * kLanes<T>);
    }
    total->add(s);
  }
};

}  // namespace bootgrad::BOOTGRAD_ISA
