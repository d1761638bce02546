// A convolution with one weight for all samples, and its transpose, with vectors along positions: channels out are the
// rows of the micro-kernel, whose other operand are runs of the planes of what goes in, as they lie.
//
//   y[o, p]  = bias[o] + Σ_{c,k} W[o, c, k] · x[c, p + shift]        dx[c, q] = Σ_{o,k} W[o, c, k] · gy[o, q + shift]
//
// p and q run along padded planes, so that a tap is one shift for all of them; what falls on margins is dropped. With
// strides x comes apart into planes of pixels congruent modulo the stride, and dx is put together from such.

namespace bootgrad::BOOTGRAD_ISA {

// C[m, n] + shift[m], stored.
template <class T>
struct StoreShifted {
  Store<T> store;
  const T* shift;

  template <int MR, int NV>
  BOOTGRAD_INLINE void finish(int64_t m0, int64_t mr, int64_t n0, Vector<T> (&acc)[MR][NV]) const {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      if (i < mr)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] += shift[m0 + i];
    }
    store.template finish<MR, NV>(m0, mr, n0, acc);
  }
};

// What both directions share: lines of planes, which are moved by whole vectors in ascending order. Those reach beyond
// a line, which the next one mends; where they would reach beyond a plane, it has room behind, or the line is moved
// exactly.
template <class T>
struct ConvPlanes {
  const ConvProductCall& call;
  const ConvPlan& plan = *call.plan;
  const Runtime& runtime = *call.runtime;
  const T* weight = static_cast<const T*>(call.weight);

  static constexpr int64_t n = kLanes<T>;

  // Entries from the first to the last of `count` positions in a plane of `size`.
  static int64_t span_of(const int64_t count[3], const int64_t size[3]) {
    return ((count[0] - 1) * size[1] + count[1] - 1) * size[2] + count[2];
  }

  static bool beyond(const T* line, int64_t count, int64_t unit, const T* end) {
    return line + (count + unit - 1) / unit * unit > end;
  }

  // Into a plane, with zeros behind the line; `end` is that of the tensor.
  static BOOTGRAD_INLINE void take_line(const T* in, T* out, int64_t count, const T* end) {
    if (beyond(in, count, n, end)) return copy_row(in, out, count);
    for (int64_t i = 0; i < count; i += n) store<T>(out + i, load<T>(in + i));
    store<T>(out + count, Vector<T>{});
  }

  // Out of it; `end` is that of a group of planes.
  static BOOTGRAD_INLINE void give_line(const T* in, T* out, int64_t count, const T* end) {
    if (beyond(out, count, n, end)) return copy_row(in, out, count);
    for (int64_t i = 0; i < count; i += n) store<T>(out + i, load<T>(in + i));
  }

  // Every second entry of two vectors, from the first or the second on.
  template <int First, int... I>
  static BOOTGRAD_INLINE Vector<T> every_second(const Vector<T>& a, const Vector<T>& b, Lanes<I...>) {
    return __builtin_shufflevector(a, b, (2 * I + First)...);
  }
};

template <class T>
struct ConvOutput : ConvPlanes<T> {
  using Planes = ConvPlanes<T>;
  using Planes::call, Planes::plan, Planes::runtime, Planes::weight, Planes::n;

  explicit ConvOutput(const ConvProductCall& c) : Planes{c} {
    for (int d = 0; d < 3; ++d) {
      const int64_t reach = plan.dilation[d] * (plan.kernel[d] - 1) + 1;
      parts[d] = reach < plan.stride[d] ? reach : plan.stride[d];
      size[d] = (plan.xs[d] - 1) / plan.stride[d] + 1;
    }
    phases = parts[0] * parts[1] * parts[2], pixels = size[0] * size[1] * size[2];
    as_is = phases == 1 && pixels == plan.pixels && plan.x_plane == plan.pixels;
    plane = as_is ? pixels : pixels + n;
    span = Planes::span_of(plan.P, size), ld = round_up<T>(span);
    compact = span == plan.T;
  }

  void run() {
    Carver c{0};
    for (int round = 0; round < 2; ++round) {
      if (round == 1) c = {reinterpret_cast<uintptr_t>(runtime.scratch(kSharedScratch, c.used))};
      shift = c.take<int64_t>(plan.R);
      depth = c.take<int64_t>(plan.R);
      row = c.take<int64_t>(plan.Og);
      line = c.take<int64_t>(plan.S[0] * plan.S[1]);
      bias = c.take<T>(plan.O);
    }
    tabulate();
    const int64_t x_size = plan.C * phases * plane + n;
    share(
        runtime, plan.B,
        [&](Carver& carver) {
          return Memory{carver.take<T>(x_size), compact ? nullptr : carver.take<T>(plan.Og * ld + n)};
        },
        [&](const Memory& m) { clear(m.x, x_size); }, [&](int64_t b, const Memory& m) { sample(b, m); });
  }

 private:
  int64_t parts[3], size[3], phases;  // of x by dimension, the size of their planes, and how many there are
  int64_t pixels, plane;              // entries of a plane, and from one to the next
  int64_t span, ld;                   // entries from the first to the last position
  bool as_is, compact;                // x and y lie in memory as the kernel has them
  int64_t *shift, *depth, *row;       // [R], [R], [Og]
  int64_t* line;                      // [S0·S1] where a line of x goes, −1 where no tap meets it
  T* bias;

  struct Memory {
    T *x, *y;  // [C, phases, plane], [Og, ld]
  };

  void tabulate() const {
    const int64_t (&K)[3] = plan.kernel, (&s)[3] = plan.stride;
    for (int64_t r = 0; r < plan.R; ++r) {
      const int64_t k = r % plan.K;
      const int64_t e[3] = {k / (K[1] * K[2]) * plan.dilation[0], k / K[2] % K[1] * plan.dilation[1],
                            k % K[2] * plan.dilation[2]};
      shift[r] = (r / plan.K * phases + part_of(e[0], e[1]) + e[2] % s[2]) * plane +
                 (e[0] / s[0] * size[1] + e[1] / s[1]) * size[2] + e[2] / s[2];
      depth[r] = r;
    }
    for (int64_t o = 0; o < plan.Og; ++o) row[o] = o * plan.R;
    for (int64_t i = 0; i < plan.S[0] * plan.S[1]; ++i) {
      const int64_t at[2] = {i / plan.S[1] + plan.padding[0], i % plan.S[1] + plan.padding[1]};
      const bool met = at[0] % s[0] < parts[0] && at[1] % s[1] < parts[1];
      line[i] = met ? part_of(at[0], at[1]) * plane + (at[0] / s[0] * size[1] + at[1] / s[1]) * size[2] : -1;
    }
    clear(bias, plan.O);
    if (call.bias) copy_row(static_cast<const T*>(call.bias), bias, plan.O);
  }

  // The first phase of a line.
  int64_t part_of(int64_t i, int64_t j) const {
    return (i % plan.stride[0] * parts[1] + j % plan.stride[1]) * parts[2];
  }

  const T* split(int64_t b, T* out) const {
    const T* x = static_cast<const T*>(call.x) + b * plan.C * plan.pixels;
    if (as_is && (plan.B - b - 1) * plan.C * plan.pixels >= n) return x;  // vectors run beyond the last plane
    if (as_is) {
      copy_row(x, out, plan.C * plan.pixels);
      return out;
    }
    const int64_t lines = plan.S[0] * plan.S[1];
    const T* const end = static_cast<const T*>(call.x) + plan.B * plan.C * plan.pixels;
    T* to = out;
    for (int64_t c = 0; c < plan.C; ++c, to += phases * plane)
      for (int64_t i = 0; i < lines; ++i, x += plan.S[2])
        if (line[i] >= 0) split_line(x, to + line[i], end);
    return out;
  }

  void split_line(const T* x, T* out, const T* end) const {
    const int64_t width = plan.S[2], step = plan.stride[2], low = plan.padding[2];
    if (step == 1) return Planes::take_line(x, out + low, width, end);
    if (step == 2 && !Planes::beyond(x, width, 2 * n, end)) {
      typename LanesUpTo<n>::type lanes;
      if (low % 2 < parts[2]) {
        T* to = out + low % 2 * plane + low / 2;
        for (int64_t i = 0; i < width; i += 2 * n)
          store<T>(to + i / 2, Planes::template every_second<0>(load<T>(x + i), load<T>(x + i + n), lanes));
        store<T>(to + (width + 1) / 2, Vector<T>{});
      }
      if ((low + 1) % 2 < parts[2]) {
        T* to = out + (low + 1) % 2 * plane + (low + 1) / 2;
        for (int64_t i = 0; i < width; i += 2 * n)
          store<T>(to + i / 2, Planes::template every_second<1>(load<T>(x + i), load<T>(x + i + n), lanes));
        store<T>(to + width / 2, Vector<T>{});
      }
      return;
    }
    for (int64_t w = 0; w < width; ++w)
      if ((w + low) % step < parts[2]) out[(w + low) % step * plane + (w + low) / step] = x[w];
  }

  void sample(int64_t b, const Memory& m) const {
    const T* x = split(b, m.x);
    T* y = static_cast<T*>(call.y) + b * plan.O * plan.T;
    for (int64_t g = 0; g < plan.groups; ++g, x += plan.Cg * phases * plane, y += plan.Og * plan.T) {
      const int64_t rows = compact ? span : ld;
      gemm_of<T>(plan.Og, span, plan.R, GatheredBoth<T>{{weight + g * plan.Og * plan.R, row, depth}, shift}, x, 0,
                 StoreShifted<T>{{compact ? y : m.y, rows, rows, T(1), false, nullptr}, bias + g * plan.Og});
      if (compact) continue;
      T* to = y;
      for (int64_t o = 0; o < plan.Og; ++o)
        for (int64_t i = 0; i < plan.P[0]; ++i)
          for (int64_t j = 0; j < plan.P[1]; ++j, to += plan.P[2])
            Planes::give_line(m.y + o * ld + (i * size[1] + j) * size[2], to, plan.P[2], y + plan.Og * plan.T);
    }
  }
};

template <class T>
struct ConvInputGrad : ConvPlanes<T> {
  using Planes = ConvPlanes<T>;
  using Planes::call, Planes::plan, Planes::runtime, Planes::weight, Planes::n;

  explicit ConvInputGrad(const ConvProductCall& c) : Planes{c} {
    for (int64_t i = 0; i < plan.n_phases; ++i)
      if (span_of(plan.phases[i]) > longest) longest = span_of(plan.phases[i]);
    ld = round_up<T>(longest);
    as_is = plan.g_plane == plan.T, compact = plan.n_phases == 1 && longest == plan.pixels;
    plane = as_is ? plan.T : plan.g_plane + n;
    for (int d = 0; d < 3; ++d) parts[d] = plan.stride[d] < plan.S[d] ? plan.stride[d] : plan.S[d];
  }

  void run() {
    Carver c{0};
    for (int round = 0; round < 2; ++round) {
      if (round == 1) c = {reinterpret_cast<uintptr_t>(runtime.scratch(kSharedScratch, c.used))};
      depth = c.take<int64_t>(plan.reached * plan.Og);
      shift = c.take<int64_t>(plan.reached * plan.Og);
      row = c.take<int64_t>(plan.Cg);
      line = c.take<int64_t>(plan.S[0] * plan.S[1]);
    }
    for (int64_t i = 0; i < plan.S[0] * plan.S[1]; ++i) {
      const int64_t at[2] = {i / plan.S[1], i % plan.S[1]};
      line[i] = (at[0] % parts[0] * parts[1] + at[1] % parts[1]) * parts[2] * plan.Cg * ld +
                (at[0] / plan.stride[0] * plan.gs[1] + at[1] / plan.stride[1]) * plan.gs[2];
    }
    for (int64_t i = 0; i < plan.n_phases; ++i)
      for (int64_t j = 0; j < plan.phases[i].taps * plan.Og; ++j) {
        const int64_t at = plan.phases[i].first_tap * plan.Og + j, o = j % plan.Og;
        depth[at] = o * plan.R + plan.tap_order[at / plan.Og];
        shift[at] = plan.phases[i].depth[j] + o * (plane - plan.g_plane);
      }
    for (int64_t i = 0; i < plan.Cg; ++i) row[i] = i * plan.K;
    const int64_t gy_size = plan.O * plane + n;
    share(
        runtime, plan.B,
        [&](Carver& carver) {
          return Memory{carver.take<T>(gy_size), compact ? nullptr : carver.take<T>(plan.n_phases * plan.Cg * ld + n)};
        },
        [&](const Memory& m) { clear(m.gy, gy_size); }, [&](int64_t b, const Memory& m) { sample(b, m); });
  }

 private:
  int64_t longest = 0, ld, plane;  // of phases' pixels in a padded plane of gy; from one plane of gy to the next
  int64_t parts[3];                // phases by dimension
  bool as_is, compact;             // gy and dx lie in memory as the kernel has them
  int64_t *depth, *shift, *row;    // [reached·Og], [reached·Og], [Cg]
  int64_t* line;                   // [S0·S1] where a line of dx comes from

  struct Memory {
    T *gy, *dx;  // [O, plane], [phases, Cg, ld]
  };

  static int64_t span_of(const Phase& phase) { return phase.pixels > 0 ? phase.rows[phase.pixels - 1] + 1 : 0; }

  void sample(int64_t b, const Memory& m) const {
    const T* gy = take(b, m.gy);
    T* dx = static_cast<T*>(call.dx) + b * plan.C * plan.pixels;
    for (int64_t g = 0; g < plan.groups; ++g, gy += plan.Og * plane, dx += plan.Cg * plan.pixels) {
      for (int64_t i = 0; i < plan.n_phases; ++i) {
        const Phase& phase = plan.phases[i];
        const int64_t span = span_of(phase), rows = compact ? span : ld, first = phase.first_tap * plan.Og;
        gemm_of<T>(plan.Cg, span, phase.taps * plan.Og,
                   GatheredBoth<T>{{weight + g * plan.Og * plan.R, row, depth + first}, shift + first}, gy, 0,
                   Store<T>{compact ? dx : m.dx + i * plan.Cg * ld, rows, rows, T(1), false, nullptr});
      }
      if (!compact) put(m.dx, dx);
    }
  }

  const T* take(int64_t b, T* out) const {
    const T* gy = static_cast<const T*>(call.gy) + b * plan.O * plan.T;
    if (as_is && (plan.B - b - 1) * plan.O * plan.T >= n) return gy;  // vectors run beyond the last plane
    if (as_is) {
      copy_row(gy, out, plan.O * plan.T);
      return out;
    }
    const T* const end = static_cast<const T*>(call.gy) + plan.B * plan.O * plan.T;
    for (int64_t o = 0; o < plan.O; ++o, out += plane)
      for (int64_t i = 0; i < plan.P[0]; ++i)
        for (int64_t j = 0; j < plan.P[1]; ++j, gy += plan.P[2])
          Planes::take_line(gy, out + ((i + plan.glow[0]) * plan.gs[1] + j + plan.glow[1]) * plan.gs[2] + plan.glow[2],
                            plan.P[2], end);
    return out - plan.O * plane;
  }

  // The phases' pixels between each other.
  void put(const T* from, T* dx) const {
    const int64_t lines = plan.S[0] * plan.S[1], width = plan.S[2], phase = plan.Cg * ld;
    const T* const end = dx + plan.Cg * plan.pixels;
    typename LanesUpTo<n>::type lanes;
    for (int64_t c = 0; c < plan.Cg; ++c, from += ld)
      for (int64_t i = 0; i < lines; ++i, dx += width) {
        const T* in = from + line[i];
        if (parts[2] == 1) {
          Planes::give_line(in, dx, width, end);
        } else if (parts[2] == 2 && !Planes::beyond(dx, width, 2 * n, end)) {
          for (int64_t w = 0; w < width; w += 2 * n) {
            Vector<T> low, high;
            interleave(load<T>(in + w / 2), load<T>(in + phase + w / 2), low, high, lanes);
            store<T>(dx + w, low);
            store<T>(dx + w + n, high);
          }
        } else {
          for (int64_t w = 0; w < width; ++w) dx[w] = in[w % parts[2] * phase + w / parts[2]];
        }
      }
  }
};

inline void conv_product(const ConvProductCall& call) {
  if (ConvNarrow<float>::fits(*call.plan)) {
    ConvCall applied{};
    applied.plan = call.plan, applied.runtime = call.runtime, applied.dtype = DType::f32;
    applied.center = call.weight, applied.shift = call.bias;
    applied.h = call.y ? call.x : call.gy, applied.dgy = call.y, applied.dx = call.dx;
    return ConvNarrow<float>(applied).run();
  }
  call.y ? ConvOutput<float>(call).run() : ConvInputGrad<float>(call).run();
}

}  // namespace bootgrad::BOOTGRAD_ISA
