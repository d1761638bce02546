// The second derivative of scaled dot-product attention, in the letters of bootgrad/ops/attention.py:
//
//   P = softmax(s Q Kᵀ + M)   A = gO Vᵀ   T = s (u_Q Kᵀ + Q u_Kᵀ)   E = (T − ⟨T⟩)∘(A − ⟨A⟩) + gO u_Vᵀ
//   P' = P∘(T − ⟨T⟩)   gS = P∘(A − ⟨A⟩)   hS = P∘(E − ⟨E⟩)         ⟨·⟩ a row's mean under P
//   by gO  P' V + P u_V     by q  s (gS u_K + hS K)     by k  s (gSᵀ u_Q + hSᵀ Q)     by v  P'ᵀ gO
//
// A head is one task, so that fewer heads than threads leave some idle. Its queries are taken in blocks, of 18 or more,
// of which four tiles of the scores' shape stay in cache up to some thousands of keys: twelve products of L·S·D by the
// micro-kernel, and three sweeps over each row. The scale goes into the copies of Q and u_Q. Under a causal mask the
// keys behind a block's last query are left out of its products.

namespace bootgrad::BOOTGRAD_ISA {

// eˣ for x ≤ 0: zero below the smallest normal number. By eˣ = 2ⁿ eʳ, |r| ≤ ln 2 / 2, and a series for eʳ.
template <class T>
struct ExpOf;
template <>
struct ExpOf<float> {
  typedef int32_t Bits __attribute__((vector_size(BOOTGRAD_VECTOR_BYTES)));
  static constexpr int mantissa = 23, bias = 127, degree = 7;
  static constexpr float least = -87.3f, round = 0x1.8p23f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct ExpOf<double> {
  typedef int64_t Bits __attribute__((vector_size(BOOTGRAD_VECTOR_BYTES)));
  static constexpr int mantissa = 52, bias = 1023, degree = 13;
  static constexpr double least = -708.3, round = 0x1.8p52, ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
};

template <class T>
BOOTGRAD_INLINE Vector<T> exp_of(const Vector<T>& x) {
  using E = ExpOf<T>;
  const Vector<T> inside = x < E::least ? Vector<T>{} + E::least : x;
  const Vector<T> rounded = inside * T(1.4426950408889634) + E::round, n = rounded - E::round;
  const Vector<T> r = (inside - n * E::ln2_high) - n * E::ln2_low;
  Vector<T> y = Vector<T>{} + T(1);
  // Horner's scheme of Σ rᵏ/k!
#pragma GCC unroll 16
  for (int k = E::degree; k > 0; --k) y = T(1) + y * r * (T(1) / T(k));
  typename E::Bits bits;
  __builtin_memcpy(&bits, &rounded, sizeof bits);
  bits = (bits + E::bias) << E::mantissa;  // the low bits of `rounded` are n
  Vector<T> power;
  __builtin_memcpy(&power, &bits, sizeof bits);
  return x < E::least ? Vector<T>{} : y * power;
}

template <class In>
class AttentionDoubleBackward {
  using T = Compute<In>;
  static constexpr int64_t n = kLanes<T>;

 public:
  explicit AttentionDoubleBackward(const AttentionCall& c) : call(c) {
    Dp = round_up<T>(c.D), Vp = round_up<T>(c.Dv), W = 2 * Dp + Vp;
    // Rows a vector longer than they need be are not all in the same sets of the cache.
    Sp = round_up<T>(c.S) + n;
    rows = kTileBytes / (4 * Sp * static_cast<int64_t>(sizeof(T))) / kTileRows * kTileRows;
    rows = rows < kTileRows ? kTileRows : rows;
    rows = rows < c.L ? rows : c.L;
  }

  void run() const {
    share(
        *call.runtime, call.N * call.H, [&](Carver& c) { return Memory(c, *this); }, [&](Memory& m) { begin(m); },
        [&](int64_t head, Memory& m) { work(head / call.H, head % call.H, m); });
  }

 private:
  static constexpr int64_t kTileBytes = int64_t{1} << 18, kTileRows = 18;

  const AttentionCall& call;
  int64_t Dp, Vp, W, Sp, rows;

  struct Memory {
    Memory(Carver& c, const AttentionDoubleBackward& of) {
      const AttentionCall& call = of.call;
      const int64_t S = call.S;
      kt = c.take<T>((2 * call.D + 2 * call.Dv) * of.Sp);
      k = c.take<T>(S * of.Dp), uk = c.take<T>(S * of.Dp), v = c.take<T>(S * of.Vp), uv = c.take<T>(S * of.Vp);
      dk = c.take<T>(S * of.Dp), dv = c.take<T>(S * of.Vp);
      queries = c.take<T>(of.rows * of.W);
      tiles = c.take<T>(4 * of.rows * of.Sp);
      out = c.take<T>(of.rows * (of.Dp > of.Vp ? of.Dp : of.Vp));
      each = c.take<int64_t>(of.longest());
      query = c.take<int64_t>(of.rows), score = c.take<int64_t>(of.rows), both = c.take<int64_t>(2 * call.D);
    }
    T* kt;                          // [2·D + 2·Dv, Sp]  Kᵀ, u_Kᵀ, Vᵀ, u_Vᵀ
    T *k, *uk, *v, *uv;             // [S, Dp] and [S, Vp]
    T *dk, *dv;                     // the same, sums
    T* queries;                     // [rows, W]  s u_Q, s Q, gO
    T* tiles;                       // [4, rows, Sp]  scores and P; T and P'; A and gS; E and hS
    T* out;                         // [rows, Dp or Vp]
    int64_t *each, *query, *score;  // multiples of 1, W, Sp
    int64_t* both;                  // [2·D]  places of s u_Q and s Q in a query
  };

  int64_t longest() const {
    const int64_t keys = call.S > rows ? call.S : rows, features = call.D > call.Dv ? call.D : call.Dv;
    return keys > features ? keys : features;
  }

  void begin(Memory& m) const {
    const int64_t D = call.D;
    for (int64_t i = 0; i < longest(); ++i) m.each[i] = i;
    for (int64_t i = 0; i < rows; ++i) m.query[i] = i * W, m.score[i] = i * Sp;
    for (int64_t i = 0; i < D; ++i) m.both[i] = i, m.both[D + i] = Dp + i;
    // What is behind the last key counts in no product, and behind the last feature in no result.
    clear(m.kt, 2 * (D + call.Dv) * Sp);
    clear(m.k, call.S * Dp), clear(m.uk, call.S * Dp), clear(m.v, call.S * Vp), clear(m.uv, call.S * Vp);
    clear(m.queries, rows * W);
  }

  const In* at(const AttentionCall::Rows& t, int64_t sample, int64_t head, int64_t row) const {
    if (!t.data) return nullptr;
    return static_cast<const In*>(t.data) + sample * t.stride[0] + head * t.stride[1] + row * t.stride[2];
  }

  // A factor times rows of an input, or zeros.
  void copy(const AttentionCall::Rows& t, int64_t sample, int64_t head, int64_t row, int64_t count, int64_t columns,
            T* out, int64_t ld, T factor) const {
    if (const In* in = at(t, sample, head, row)) return copy_rows(in, t.stride[2], count, columns, out, ld, factor);
    for (int64_t r = 0; r < count; ++r) clear(out + r * ld, columns);
  }

  void keys(int64_t sample, int64_t head, Memory& m) const {
    const int64_t S = call.S, D = call.D, Dv = call.Dv;
    const auto both = [&](const AttentionCall::Rows& t, int64_t columns, T* panel, int64_t ld, T* turned) {
      copy(t, sample, head, 0, S, columns, panel, ld, T(1));
      transpose<T>(panel, ld, S, columns, turned, Sp, T(1));
    };
    both(call.k, D, m.k, Dp, m.kt);
    both(call.uk, D, m.uk, Dp, m.kt + D * Sp);
    both(call.v, Dv, m.v, Vp, m.kt + 2 * D * Sp);
    both(call.uv, Dv, m.uv, Vp, m.kt + (2 * D + Dv) * Sp);
    clear(m.dk, S * Dp), clear(m.dv, S * Vp);
  }

  void work(int64_t sample, int64_t head, Memory& m) const {
    const int64_t S = call.S, D = call.D, Dv = call.Dv;
    const T s = static_cast<T>(call.scale);
    keys(sample, head, m);
    T *P = m.tiles, *tangent = P + rows * Sp, *gS = tangent + rows * Sp, *hS = gS + rows * Sp;
    for (int64_t first = 0; first < call.L; first += rows) {
      const int64_t count = call.L - first < rows ? call.L - first : rows;
      const int64_t reached = call.is_causal && first + count < S ? first + count : S;
      copy(call.uq, sample, head, first, count, D, m.queries, W, s);
      copy(call.q, sample, head, first, count, D, m.queries + Dp, W, s);
      copy(call.g, sample, head, first, count, Dv, m.queries + 2 * Dp, W, T(1));
      const auto scores = [&](const T* from, const int64_t* depth, int64_t K, const T* panel, T* tile) {
        const int64_t columns = round_up<T>(reached);
        gemm<T>(count, reached, K, {from, m.query, depth}, panel, Sp,
                Store<T>{tile, Sp, columns, T(1), false, nullptr});
      };
      scores(m.queries + Dp, m.each, D, m.kt, P);
      scores(m.queries, m.both, 2 * D, m.kt, tangent);
      scores(m.queries + 2 * Dp, m.each, Dv, m.kt + 2 * D * Sp, gS);
      scores(m.queries + 2 * Dp, m.each, Dv, m.kt + (2 * D + Dv) * Sp, hS);
      for (int64_t r = 0; r < count; ++r) {
        if (call.mask) add_mask(P + r * Sp, sample, head, first + r, reached);
        row(P + r * Sp, tangent + r * Sp, gS + r * Sp, hS + r * Sp,
            call.is_causal && first + r + 1 < reached ? first + r + 1 : reached, round_up<T>(reached));
      }
      const auto by_queries = [&](const T* tile, const T* panel, int64_t ld, int64_t columns, bool add, T factor) {
        gemm<T>(count, columns, reached, {tile, m.score, m.each}, panel, ld,
                Store<T>{m.out, ld, ld, factor, add, nullptr});
      };
      const auto put = [&](void* t, int64_t ld, int64_t columns) {
        copy_rows(m.out, ld, count, columns, place(t, sample, head, first, call.L, columns), call.H * columns, T(1));
      };
      by_queries(tangent, m.v, Vp, Dv, false, T(1));
      by_queries(P, m.uv, Vp, Dv, true, T(1));
      put(call.dg, Vp, Dv);
      by_queries(gS, m.uk, Dp, D, false, s);
      by_queries(hS, m.k, Dp, D, true, s);
      put(call.dq, Dp, D);
      const auto by_keys = [&](const T* tile, const T* from, int64_t columns, T* sum, int64_t ld) {
        gemm<T>(reached, columns, count, {tile, m.each, m.score}, from, W, Store<T>{sum, ld, ld, T(1), true, nullptr});
      };
      by_keys(gS, m.queries, D, m.dk, Dp);
      by_keys(hS, m.queries + Dp, D, m.dk, Dp);
      by_keys(tangent, m.queries + 2 * Dp, Dv, m.dv, Vp);
    }
    copy_rows(m.dk, Dp, S, D, place(call.dk, sample, head, 0, S, D), call.H * D, T(1));
    copy_rows(m.dv, Vp, S, Dv, place(call.dv, sample, head, 0, S, Dv), call.H * Dv, T(1));
  }

  // Results are (N, length, H, columns).
  In* place(void* out, int64_t sample, int64_t head, int64_t row, int64_t length, int64_t columns) const {
    return static_cast<In*>(out) + ((sample * length + row) * call.H + head) * columns;
  }

  void add_mask(T* scores, int64_t sample, int64_t head, int64_t query, int64_t count) const {
    const int64_t* stride = call.mask_stride;
    const T* mask = static_cast<const T*>(call.mask) + sample * stride[0] + head * stride[1] + query * stride[2];
    for (int64_t i = 0; i < count; ++i) scores[i] += mask[i * stride[3]];
  }

  // From scores, T, A and gO u_Vᵀ of a query, of which `count` keys count, to P, P', gS and hS; zeros behind them.
  void row(T* scores, T* t, T* a, T* e, int64_t count, int64_t columns) const {
    const T nothing = -static_cast<T>(__builtin_inf());
    for (int64_t i = count; i < columns; ++i) scores[i] = nothing;
    Vector<T> most = Vector<T>{} + nothing;
    for (int64_t i = 0; i < columns; i += n) {
      const Vector<T> x = load<T>(scores + i);
      most = x > most ? x : most;
    }
    T largest = most[0];
    for (int64_t i = 1; i < n; ++i) largest = most[i] > largest ? most[i] : largest;
    if (largest == nothing) largest = 0;  // no key counts, or numbers that are none
    // Sums of runs, so that rounding errors do not pile up in one chain.
    constexpr int64_t run = 64 * n;
    Vector<T> total{}, of_t{}, of_a{}, of_e{};
    for (int64_t i = 0; i < columns;) {
      Vector<T> run_total{}, run_t{}, run_a{};
      for (const int64_t end = columns - i < run ? columns : i + run; i < end; i += n) {
        const Vector<T> p = exp_of<T>(load<T>(scores + i) - largest);
        run_total += p;
        run_t += p * load<T>(t + i);
        run_a += p * load<T>(a + i);
        store<T>(scores + i, p);
      }
      total += run_total, of_t += run_t, of_a += run_a;
    }
    const T sum = sum_of_lanes<T>(total), share = sum == 0 ? T(0) : 1 / sum;
    const T mean_t = sum_of_lanes<T>(of_t) * share, mean_a = sum_of_lanes<T>(of_a) * share;
    for (int64_t i = 0; i < columns;) {
      Vector<T> run_e{};
      for (const int64_t end = columns - i < run ? columns : i + run; i < end; i += n) {
        const Vector<T> p = load<T>(scores + i) * share, apart_t = load<T>(t + i) - mean_t,
                        apart_a = load<T>(a + i) - mean_a, x = load<T>(e + i) + apart_t * apart_a;
        run_e += p * x;
        store<T>(scores + i, p);
        store<T>(t + i, p * apart_t);
        store<T>(a + i, p * apart_a);
        store<T>(e + i, x);
      }
      of_e += run_e;
    }
    const T mean_e = sum_of_lanes<T>(of_e);
    for (int64_t i = 0; i < columns; i += n) store<T>(e + i, load<T>(scores + i) * (load<T>(e + i) - mean_e));
  }
};

inline void attention_double_backward(const AttentionCall& call) {
  switch (call.dtype) {
    case DType::f32: return AttentionDoubleBackward<float>(call).run();
    case DType::f64: return AttentionDoubleBackward<double>(call).run();
    case DType::bf16: return AttentionDoubleBackward<bf16>(call).run();
    case DType::f16: return AttentionDoubleBackward<f16>(call).run();
  }
}

}  // namespace bootgrad::BOOTGRAD_ISA
