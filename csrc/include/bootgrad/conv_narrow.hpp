// Convolutions with many narrow groups, depthwise ones above all: lanes are positions, because a group has too few
// channels to fill a vector, and no two groups share a weight.
//
//   g[t]         an output channel's plane in rows as wide as those of x, zeros between them and in front
//   x_ρ[q]       the padded pixels q·stride + ρ: one plane for each residue ρ of the stride
//   G[r]         = Σ_t x_ρ[t + a] · g[t]                where tap r is a·stride + ρ;   D = G − center
//   ∂s/∂gy[t]    = 2 Σ_r x_ρ[t + a] · D[r]
//   ∂s/∂x_ρ[q]   = 2 Σ_{o of the group} Σ_{r of ρ} g_o[q − a] · D_o[r]
//
// Where G is applied to another input instead, that takes the place of x or g in these last two once G is made, and
// center + factor·G that of 2D. Without x it is the center alone: a convolution or its transpose.
//
// An offset left of the first column is in the row before, whose end is zeros: x is wider than g by the largest a.
// Groups come in blocks of as many as there are lanes, so that a block's weights are whole vectors.

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
struct ConvNarrow : ConvLayer<In> {
  using Layer = ConvLayer<In>;
  using Layer::call, Layer::plan, Layer::runtime;
  using typename Layer::T;

  // Half of the micro-kernel's lanes or more would idle, and the copies of a block's x stay small.
  static bool fits(const ConvPlan& plan) {
    return plan.groups > 1 && plan.Og > 0 && 2 * plan.Og <= n && plan.Cg > 0 && plan.Cg <= 16 && plan.K <= 64 &&
           plan.T > 0;
  }

  explicit ConvNarrow(const ConvCall& c) : Layer(c, false) {
    for (int d = 0; d < 3; ++d) {
      const int64_t stride = plan.stride[d];
      residues[d] = stride < plan.xs[d] ? stride : plan.xs[d];
      width[d] = (plan.xs[d] + stride - 1) / stride;
      reach[d] = plan.dilation[d] * (plan.kernel[d] - 1) / stride;
    }
    phases = residues[0] * residues[1] * residues[2];
    const int64_t end[3] = {plan.P[0] - 1, plan.P[1] - 1, plan.P[2] - 1};
    plane = width[0] * width[1] * width[2];
    length = round_up<T>(flat(end) + 1);
    x_step = round_up<T>(plane) + n, front = round_up<T>(flat(reach)), g_step = front + x_step;
    if (!call.center) return;
    T* packed = static_cast<T*>(runtime.scratch(kCenterScratch, static_cast<size_t>(size) * sizeof(T)));
    clear(packed + size - n, n);
    copy_row(static_cast<const T*>(call.center), packed, plan.O * plan.R);
    this->center = packed;
  }

  struct Memory {
    T *x, *g;         // [n·Cg, phases, x_step], [n·Og, g_step]
    T *lanes, *keep;  // [n·Og·R, n], [size]
    T* out;           // a block's results, as x or g: a load of what was just stored would wait for earlier stores
    T *row, *weight;  // a row that may be read and written in whole vectors; D by `order`
    int64_t *tap, *back, *order, *first;  // offsets of r in x_ρ; of (ρ, o, k) in g, and in D; [phases + 1]
    int64_t *line, *column;               // offset in the x_ρ of a row of pixels, and of a pixel in its row
    int64_t* unread;                      // offsets in x_ρ of what no tap reads
    int64_t unread_count;
  };

  void run() const {
    const bool sums = call.sum;
    const int64_t blocks = sums ? divide<T>(plan.B, 256, plan.groups, size, n).blocks : plan.B;
    T* partial = nullptr;
    if (sums)
      partial = static_cast<T*>(runtime.scratch(kSharedScratch, static_cast<size_t>(blocks * size) * sizeof(T)));
    share(
        runtime, blocks, [&](Carver& c) { return lay_out(c); }, [&](Memory& m) { begin(m); },
        [&](int64_t block, const Memory& m) {
          const Range range = part(plan.B, blocks, block);
          for (int64_t b = range.begin; b < range.end; ++b)
            sample(b, m, sums ? partial + block * size : nullptr, b == range.begin);
        });
    if (sums) combine<T>(runtime, partial, blocks, size, plan.O * plan.R, 1, 1, static_cast<T*>(call.sum));
  }

 private:
  static constexpr int64_t n = kLanes<T>;
  const int64_t size = round_up<T>(plan.O * plan.R);
  const T multiple = call.h ? T(1) : this->twice;  // what D is multiplied by
  int64_t residues[3], width[3], reach[3];
  int64_t phases, plane, length, x_step, front, g_step;

  int64_t flat(const int64_t i[3]) const { return (i[0] * width[1] + i[1]) * width[2] + i[2]; }

  Memory lay_out(Carver& c) const {
    Memory m{};
    m.x = c.take<T>(n * plan.Cg * phases * x_step);
    m.g = c.take<T>(n * plan.Og * g_step);
    m.lanes = c.take<T>(n * plan.Og * plan.R * n);
    m.keep = c.take<T>(size);
    m.out =
        c.take<T>(n * (plan.Cg * phases * x_step > plan.Og * length ? plan.Cg * phases * x_step : plan.Og * length));
    m.row = c.take<T>(round_up<T>(plan.S[2]) + 2 * n);
    m.weight = c.take<T>(plan.Og * plan.K);
    m.tap = c.take<int64_t>(plan.R);
    m.back = c.take<int64_t>(plan.Og * plan.K);
    m.order = c.take<int64_t>(plan.Og * plan.K);
    m.first = c.take<int64_t>(phases + 1);
    m.line = c.take<int64_t>(plan.S[0] * plan.S[1]);
    m.column = c.take<int64_t>(plan.S[2] + 1);
    m.unread = c.take<int64_t>(phases * plane);
    return m;
  }

  void begin(Memory& m) const {
    clear(m.row, round_up<T>(plan.S[2]) + 2 * n);
    clear(m.x, n * plan.Cg * phases * x_step);
    clear(m.g, n * plan.Og * g_step);
    int64_t next = 0;
    for (int64_t phase = 0; phase < phases; ++phase) {
      m.first[phase] = next;
      for (int64_t o = 0; o < plan.Og; ++o)
        for (int64_t k = 0; k < plan.K; ++k) {
          int64_t a[3];
          if (place(k, a) != phase) continue;
          m.back[next] = o * g_step + front - flat(a);
          m.order[next++] = o * plan.R + k;
          for (int64_t j = 0; j < plan.Cg && o == 0; ++j)
            m.tap[j * plan.K + k] = (j * phases + phase) * x_step + flat(a);
        }
    }
    m.first[phases] = next;
    for (int64_t i = 0; i < plan.S[0]; ++i)
      for (int64_t j = 0; j < plan.S[1]; ++j) {
        const int64_t s[2] = {i + plan.padding[0], j + plan.padding[1]};
        const int64_t at[3] = {s[0] / plan.stride[0], s[1] / plan.stride[1], 0};
        const int64_t phase = (s[0] % plan.stride[0] * residues[1] + s[1] % plan.stride[1]) * residues[2];
        m.line[i * plan.S[1] + j] = phase * x_step + flat(at);
      }
    for (int64_t l = 0; l <= plan.S[2]; ++l) {
      const int64_t s = l + plan.padding[2];
      m.column[l] = s % plan.stride[2] * x_step + s / plan.stride[2];
    }
    list_unread(m);
  }

  // The phase of kernel position k, and its offset a.
  int64_t place(int64_t k, int64_t a[3]) const {
    const int64_t at[3] = {k / (plan.kernel[1] * plan.kernel[2]), k / plan.kernel[2] % plan.kernel[1],
                           k % plan.kernel[2]};
    int64_t phase = 0;
    for (int d = 0; d < 3; ++d) {
      const int64_t offset = plan.dilation[d] * at[d];
      a[d] = offset / plan.stride[d];
      phase = phase * residues[d] + offset % plan.stride[d];
    }
    return phase;
  }

  // Products with the zeros between rows must not see what does not belong to a sample's gradient: 0·NaN is NaN.
  void list_unread(Memory& m) const {
    for (int64_t phase = 0; phase < phases; ++phase)
      for (int64_t q = 0; q < plane; ++q) {
        const int64_t of[3] = {phase / (residues[1] * residues[2]), phase / residues[2] % residues[1],
                               phase % residues[2]};
        const int64_t at[3] = {q / (width[1] * width[2]), q / width[2] % width[1], q % width[2]};
        bool margin = false, read = true;
        for (int d = 0; d < 3; ++d) {
          const int64_t s = at[d] * plan.stride[d] + of[d];
          margin |= s < plan.padding[d] || (s >= plan.padding[d] + plan.S[d] && s < plan.xs[d]);
          bool met = false;
          for (int64_t k = 0; k < plan.kernel[d]; ++k) {
            const int64_t t = s - k * plan.dilation[d];
            met |= t >= 0 && t % plan.stride[d] == 0 && t / plan.stride[d] < plan.P[d];
          }
          read &= met;
        }
        if (!read && !margin) m.unread[m.unread_count++] = phase * x_step + q;
      }
  }

  void sample(int64_t b, const Memory& m, T* sum, bool fresh) const {
    const T* w = static_cast<const T*>(call.w);
    Total<T> plain, deviation, inner;
    const Norms<T> norms{
        0,         this->center, sum, fresh, call.dx || call.dgy ? m.keep : nullptr, call.sq_norms ? &plain : nullptr,
        &deviation};
    for (int64_t g0 = 0; g0 < plan.groups; g0 += n) {
      const int64_t count = plan.groups - g0 < n ? plan.groups - g0 : n, rows = count * plan.Og * plan.R;
      if (call.x) load_x(static_cast<const In*>(call.x), b, g0, count, m);
      for (int64_t o = 0; o < count * plan.Og && call.x; ++o) {
        T* g = m.g + o * g_step + front;
        load_g(this->gy_of(b), g0, o, g);
        if (call.bias && !call.biased)
          static_cast<T*>(call.bias)[b * plan.O + g0 * plan.Og + o] = total(g) * (w ? w[b] : T(1));
        for (int64_t r = 0; r < plan.R;)
          r += in_chunks(plan.R - r, [&](auto taps) __attribute__((always_inline)) {
            correlate<taps>(m.x + o / plan.Og * plan.Cg * phases * x_step, m.tap + r, g, length,
                            m.lanes + (o * plan.R + r) * n);
          });
      }
      clear(m.lanes + rows * n, (round_up<T>(rows) - rows) * n);
      if (!call.x) copy_row(this->center + g0 * plan.Og * plan.R, m.keep + g0 * plan.Og * plan.R, rows);
      for (int64_t r = 0; r < rows && call.x; r += n) {
        Vector<T> gradient[1][1] = {{add_lanes(m.lanes + r * n) * (w ? w[b] : T(1))}};
        if (call.h)
          displace(gradient[0][0], g0 * plan.Og * plan.R + r, m);
        else if (call.inner)
          Dot<T>{this->center, 0, &inner}.template finish<1, 1>(0, 1, g0 * plan.Og * plan.R + r, gradient);
        else
          norms.template finish<1, 1>(0, 1, g0 * plan.Og * plan.R + r, gradient);
      }
      if (call.h && call.dgy) load_x(static_cast<const In*>(call.h), b, g0, count, m);
      for (int64_t o = 0; o < count * plan.Og && call.h && call.dx; ++o)
        load_g(static_cast<const In*>(call.h) + b * plan.O * plan.T, g0, o, m.g + o * g_step + front);
      if (call.dgy) gradient_of_gy(b, g0, count, m);
      if (call.dx) gradient_of_x(b, g0, count, m);
    }
    if (call.h) return;
    if (call.inner) static_cast<T*>(call.inner)[b] = static_cast<T>(inner.value());
    if (call.sq_norms) static_cast<T*>(call.sq_norms)[b] = static_cast<T>(plain.value());
    if (call.deviation) static_cast<T*>(call.deviation)[b] = static_cast<T>(deviation.value());
    this->add_bias(b);
  }

  static constexpr int64_t kNoMargin[3] = {0, 0, 0};

  void load_g(const In* gy, int64_t g0, int64_t o, T* out) const {
    pad(gy + (g0 * plan.Og + o) * plan.T, 1, plan.P, out, width, kNoMargin);
  }

  // A vector of the weights that another input is multiplied by.
  void displace(const Vector<T>& gradient, int64_t at, const Memory& m) const {
    const T* from = this->center;
    store<T>(m.keep + at, from ? load<T>(from + at) + gradient * static_cast<T>(call.factor) : gradient);
  }

  template <int64_t count>
  struct Count {
    constexpr operator int64_t() const { return count; }
  };

  // Calls body with a number of taps that is compiled, at most `left`, and returns it.
  template <class Body>
  static BOOTGRAD_INLINE int64_t in_chunks(int64_t left, const Body& body) {
    if (left >= 9) return body(Count<9>{}), 9;
    if (left >= 4) return body(Count<4>{}), 4;
    if (left >= 2) return body(Count<2>{}), 2;
    return body(Count<1>{}), 1;
  }

  // lanes[i] = Σ_v x[offset i + v] · g[v], lane by lane.
  template <int64_t taps>
  static __attribute__((noinline)) void correlate(const T* x, const int64_t* offset, const T* g, int64_t length,
                                                  T* lanes) {
    const T* from[taps];
    Vector<T> sum[taps] = {};
    for (int64_t i = 0; i < taps; ++i) from[i] = x + offset[i];
    for (int64_t v = 0; v < length;) {
      Vector<T> run[taps] = {};
      for (const int64_t end = length - v < kRun * n ? length : v + kRun * n; v < end; v += n) {
        const Vector<T> other = load<T>(g + v);
#pragma GCC unroll 9
        for (int64_t i = 0; i < taps; ++i) run[i] += load<T>(from[i] + v) * other;
      }
#pragma GCC unroll 9
      for (int64_t i = 0; i < taps; ++i) sum[i] += run[i];
    }
#pragma GCC unroll 9
    for (int64_t i = 0; i < taps; ++i) store<T>(lanes + i * n, sum[i]);
  }

  // out[v] = multiple · Σ_i weight[i] · from[offset i + v]
  void spread(const T* from, const int64_t* offset, const T* weight, int64_t count, int64_t end, T* out) const {
    if (count == 0) clear(out, end);
    for (int64_t i = 0; i < count;)
      i += in_chunks(count - i, [&](auto taps) __attribute__((always_inline)) {
        spread_some<taps>(from, offset + i, weight + i, end, out, i > 0);
      });
  }

  template <int64_t taps>
  __attribute__((noinline)) void spread_some(const T* from, const int64_t* offset, const T* weight, int64_t end, T* out,
                                             bool add) const {
    const T* at[taps];
    Vector<T> factor[taps];
#pragma GCC unroll 9
    for (int64_t i = 0; i < taps; ++i) at[i] = from + offset[i], factor[i] = Vector<T>{} + multiple * weight[i];
    for (int64_t v = 0; v < end; v += n) {
      Vector<T> sum = add ? load<T>(out + v) : Vector<T>{};
#pragma GCC unroll 9
      for (int64_t i = 0; i < taps; ++i) sum += load<T>(at[i] + v) * factor[i];
      store<T>(out + v, sum);
    }
  }

  // Lane i of the result is the sum of row i.
  static BOOTGRAD_INLINE Vector<T> add_lanes(const T* rows) {
    Vector<T> square[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) square[i] = load<T>(rows + i * n);
    transpose_square<T>(square);
#pragma GCC unroll 8
    for (int step = n / 2; step > 0; step /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < step; ++i) square[i] += square[i + step];
    return square[0];
  }

  T total(const T* g) const {
    double sum = 0;
    for (int64_t v = 0; v < length;) {
      Vector<T> run{};
      for (const int64_t end = length - v < 64 * n ? length : v + 64 * n; v < end; v += n) run += load<T>(g + v);
      for (int64_t l = 0; l < n; ++l) sum += static_cast<double>(run[l]);
    }
    return static_cast<T>(sum);
  }

  // The channels of a block's groups, of x or what is shaped as x, each as the planes of its phases.
  void load_x(const In* x, int64_t b, int64_t g0, int64_t count, const Memory& m) const {
    const In* end = x + plan.B * plan.C * plan.pixels;
    x += (b * plan.C + g0 * plan.Cg) * plan.pixels;
    for (int64_t c = 0; c < count * plan.Cg; ++c) load_plane(x + c * plan.pixels, end, m.x + c * phases * x_step, m);
  }

  __attribute__((noinline)) void load_plane(const In* x, const In* end, T* out, const Memory& m) const {
    if (phases == 1)
      pad(x, 1, plan.S, out, plan.xs, plan.padding);
    else if (residues[2] == 2)
      split_pairs(x, end, out, m, LaneNumbers{});
    else
      for (int64_t r = 0; r < plan.S[0] * plan.S[1]; ++r)
        for (int64_t s = 0; s < plan.S[2]; ++s) out[m.line[r] + m.column[s]] = widen(*x++);
    for (int64_t i = 0; i < m.unread_count; ++i) out[m.unread[i]] = 0;
  }

  using LaneNumbers = typename LanesUpTo<static_cast<int>(n)>::type;

  // Rows of pixels, which whole vectors are read from: beyond the end of x, those of its copy. Vectors beyond a row's
  // end are zeros, and end in the next row, which is written later.
  template <int... I>
  void split_pairs(const In* x, const In* end, T* out, const Memory& m, Lanes<I...>) const {
    constexpr int64_t ahead = 4096 / static_cast<int64_t>(sizeof(In));
    const int64_t rows = plan.S[0] * plan.S[1], width = plan.S[2], whole = (width - 1) / (2 * n) * (2 * n);
    const Vector<T> number = {static_cast<T>(I)...}, zero{};
    const auto in_even = number < zero + static_cast<T>((width - whole + 1) / 2);
    const auto in_odd = number < zero + static_cast<T>((width - whole) / 2);
    for (int64_t r = 0; r < rows; ++r, x += width) {
      const T* row = reinterpret_cast<const T*>(x);
      if (!this->same || x + whole + 2 * n > end) copy_row(x, m.row, width), row = m.row;
      T *even = out + m.line[r] + m.column[0], *odd = out + m.line[r] + m.column[1];
      for (int64_t s = 0;; s += 2 * n, row += 2 * n, even += n, odd += n) {
        __builtin_prefetch(x + s + ahead), __builtin_prefetch(x + s + n + ahead);
        const Vector<T> low = load<T>(row), high = load<T>(row + n);
        const Vector<T> evens = __builtin_shufflevector(low, high, (2 * I)...);
        const Vector<T> odds = __builtin_shufflevector(low, high, (2 * I + 1)...);
        if (s == whole) {
          store<T>(even, in_even ? evens : zero), store<T>(odd, in_odd ? odds : zero);
          break;
        }
        store<T>(even, evens), store<T>(odd, odds);
      }
    }
  }

  // The inverse: whole vectors are written, 2n at a time.
  void join(const T* from, T* row, const int64_t* column) const {
    if (residues[2] == 2) {
      const T *even = from + column[0], *odd = from + column[1];
      for (int64_t s = 0; s < plan.S[2]; s += 2 * n, row += 2 * n, even += n, odd += n) {
        Vector<T> low, high;
        interleave(load<T>(even), load<T>(odd), low, high, LaneNumbers{});
        store<T>(row, low);
        if (s + n < plan.S[2]) store<T>(row + n, high);
      }
    } else {
      for (int64_t s = 0; s < plan.S[2]; ++s) row[s] = from[column[s]];
    }
  }

  void gradient_of_gy(int64_t b, int64_t g0, int64_t count, const Memory& m) const {
    const int64_t channels = count * plan.Og;
    for (int64_t o = 0; o < channels; ++o)
      spread(m.x + o / plan.Og * plan.Cg * phases * x_step, m.tap, m.keep + (g0 * plan.Og + o) * plan.R, plan.R, length,
             m.out + o * length);
    const T* shift = static_cast<const T*>(call.shift);
    for (int64_t o = 0; o < channels && shift; ++o)
      add_constant(m.out + o * length, shift[(call.x ? b * plan.O : 0) + g0 * plan.Og + o], length);
    In* out = static_cast<In*>(call.dgy) + (b * plan.O + g0 * plan.Og) * plan.T;
    for (int64_t o = 0; o < channels; ++o)
      for (int64_t i = 0; i < plan.P[0]; ++i)
        for (int64_t j = 0; j < plan.P[1]; ++j, out += plan.P[2]) {
          const int64_t at[3] = {i, j, 0};
          narrow_row(m.out + o * length + flat(at), out, plan.P[2]);
        }
  }

  void gradient_of_x(int64_t b, int64_t g0, int64_t count, const Memory& m) const {
    const int64_t channels = count * plan.Cg, rows = plan.S[0] * plan.S[1], width = plan.S[2];
    for (int64_t c = 0; c < channels; ++c) {
      const T* keep = m.keep + (g0 + c / plan.Cg) * plan.Og * plan.R + c % plan.Cg * plan.K;
      for (int64_t i = 0; i < m.first[phases]; ++i) m.weight[i] = keep[m.order[i]];
      for (int64_t phase = 0; phase < phases; ++phase) {
        const int64_t first = m.first[phase];
        spread(m.g + c / plan.Cg * plan.Og * g_step, m.back + first, m.weight + first, m.first[phase + 1] - first,
               round_up<T>(plane), m.out + (c * phases + phase) * x_step);
      }
    }
    In* out = static_cast<In*>(call.dx) + (b * plan.C + g0 * plan.Cg) * plan.pixels;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < rows; ++r, out += width) {
        const T* from = m.out + c * phases * x_step + m.line[r];
        if (phases == 1) {
          narrow_row(from + plan.padding[2], out, width);
        } else if (this->same && (channels - c) * plan.pixels - (r + 1) * width >= n) {
          join(from, reinterpret_cast<T*>(out), m.column);
        } else {
          join(from, m.row, m.column);
          narrow_row(m.row, out, width);
        }
      }
  }
};

}  // namespace bootgrad::BOOTGRAD_ISA
