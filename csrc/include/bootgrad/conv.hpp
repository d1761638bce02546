// What the paths of a convolution share: its operands in the layouts that the micro-kernel wants, and its two linear
// maps.
//
//   x      [C, x_plane]       zero-padded planes             gy     [O, g_plane]    zero-padded planes
//   gyt    [groups, T, ld]    gy with channels last          center [groups, R, ld]
//   dgyt   [T, ld]            result, channels last          dxt    [pixels, ldc]   result, channels last
//
// ld and ldc are Og and Cg rounded up to whole vectors. A linear layer has its channels last to begin with.

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
struct ConvLayer {
  using T = Compute<In>;

  ConvLayer(const ConvCall& c, bool with_center) : call(c), plan(*c.plan), runtime(*c.runtime) {
    if (call.center && with_center) pack_center();
  }

  const ConvCall& call;
  const ConvPlan& plan;
  const Runtime& runtime;
  const int64_t ld = round_up<T>(plan.Og), ldc = round_up<T>(plan.Cg);
  const int64_t weights = plan.groups * plan.R * ld, weights_t = plan.groups * plan.K * plan.Og * ldc;
  const int64_t x_size = plan.C * plan.x_plane, gy_size = plan.O * plan.g_plane, gyt_size = plan.groups * plan.T * ld;
  const bool same = sizeof(In) == sizeof(T);
  const bool copy_x = !same || plan.x_plane != plan.pixels;
  const bool copy_gy = !same || plan.g_plane != plan.T;
  const T twice = static_cast<T>(2 * call.scale);  // what derivatives of squares are multiplied by
  const T* center = nullptr;                       // [groups, R, ld]
  const T* center_t = nullptr;  // [groups, K, Og, ldc], kernel positions by phase; where dx is wanted

  const In* x_of(int64_t b) const { return static_cast<const In*>(call.x) + b * plan.C * plan.pixels; }
  const In* gy_of(int64_t b) const { return static_cast<const In*>(call.gy) + b * plan.O * plan.T; }
  const T* center_of(int64_t g) const { return center ? center + g * plan.R * ld : nullptr; }
  // Distance between the groups' first channels in x and gy.
  int64_t x_group() const { return plan.Cg * plan.x_plane; }
  int64_t gy_group() const { return plan.Og * plan.g_plane; }

  // The sample's planes, copied only where margins or another type ask for it.
  const T* padded_x(int64_t b, T* scratch) const {
    if (!copy_x) return reinterpret_cast<const T*>(x_of(b));
    pad(x_of(b), plan.C, plan.S, scratch, plan.xs, plan.padding);
    return scratch;
  }
  const T* padded_gy(int64_t b, T* scratch) const {
    if (!copy_gy) return reinterpret_cast<const T*>(gy_of(b));
    pad(gy_of(b), plan.O, plan.P, scratch, plan.gs, plan.glow);
    return scratch;
  }

  // Group g goes to out + g·stride; columns begin … end of its Og.
  void transposed_gy(int64_t b, T* out, int64_t stride, T factor, int64_t begin, int64_t end) const {
    for (int64_t g = 0; g < plan.groups; ++g)
      if (plan.channels_last)
        copy_rows(gy_of(b) + begin, plan.O, plan.T, end - begin, out + begin, ld, factor);
      else
        transpose<T>(gy_of(b) + (g * plan.Og + begin) * plan.T, plan.T, end - begin, plan.T, out + g * stride + begin,
                     ld, factor);
  }
  void transposed_gy(int64_t b, T* out) const { transposed_gy(b, out, plan.T * ld, T(1), 0, plan.Og); }

  // A group's channels of x, channels last: [pixels, ldc].
  void transposed_x(int64_t b, int64_t g, T* out) const {
    if (plan.channels_last)
      copy_rows(x_of(b), plan.C, plan.pixels, plan.C, out, ldc, T(1));
    else
      transpose<T>(x_of(b) + g * plan.Cg * plan.pixels, plan.pixels, plan.Cg, plan.pixels, out, ldc, T(1));
  }

  void write_dgy(int64_t b, int64_t g, const T* dgyt, T factor) const {
    In* out = static_cast<In*>(call.dgy) + b * plan.O * plan.T;
    if (plan.channels_last)
      copy_rows(dgyt, ld, plan.T, plan.O, out, plan.O, factor);
    else
      transpose<T>(dgyt, ld, plan.T, plan.Og, out + g * plan.Og * plan.T, plan.T, factor);
  }
  void write_dx(int64_t b, int64_t g, const T* dxt, T factor) const {
    In* out = static_cast<In*>(call.dx) + b * plan.C * plan.pixels;
    if (plan.channels_last)
      copy_rows(dxt, ldc, plan.pixels, plan.C, out, plan.C, factor);
    else
      transpose<T>(dxt, ldc, plan.pixels, plan.Cg, out + g * plan.Cg * plan.pixels, plan.pixels, factor);
  }

  // The bias's share of a sample's norm and of dgy, which are written and still in a core's cache.
  void add_bias(int64_t b) const {
    if (!call.biased) return;
    const T* c = static_cast<const T*>(call.bias_center);
    T* rows = static_cast<T*>(call.bias) + b * plan.O;
    In* dgy = call.dgy ? static_cast<In*>(call.dgy) + b * plan.O * plan.T : nullptr;
    double square = 0;
    for (int64_t o = 0; o < plan.O; ++o) {
      rows[o] = static_cast<T>(sum(gy_of(b) + o * plan.T, plan.T));
      const T apart = c ? rows[o] - c[o] : rows[o];
      square += static_cast<double>(apart) * static_cast<double>(apart);
      if (dgy) add_constant(dgy + o * plan.T, twice * apart, plan.T);
    }
    T* norm = static_cast<T*>(call.sq_norms ? call.sq_norms : call.deviation) + b;
    *norm = static_cast<T>(static_cast<double>(*norm) + square);
  }

  // out[o] = Σ_t gyt[t, o]
  void sum_positions(const T* gyt, int64_t ld_gyt, int64_t columns, T* out) const {
    for (int64_t o = 0; o < columns; o += kLanes<T>)
      sum_rows(gyt + o, plan.T, ld_gyt, out + o, columns - o < kLanes<T> ? columns - o : kLanes<T>);
  }

  // Weights [R, ld] as [reached, Og, ldc], kernel positions in the order of the phases.
  void transpose_weights(const T* from, T* out) const {
    for (int64_t j = 0; j < plan.reached; ++j)
      transpose<T>(from + plan.tap_order[j] * ld, plan.K * ld, plan.Cg, plan.Og, out + j * plan.Og * ldc, ldc, T(1));
  }

  // out[m, o] = factor · Σ_r x[rows[m] + tap r] · weights[r, o]: the convolution at M positions.
  void forward(int64_t M, const T* x, const int64_t* rows, const T* w, T* out, T factor) const {
    gemm<T>(M, plan.Og, plan.R, {x, rows, plan.tap}, w, ld, Store<T>{out, ld, ld, factor, false, nullptr});
  }

  // out[place, c] = factor · Σ_{k,o} gy[pixel, k, o] · weights[(c,k), o]: its transpose, at a phase's pixels.
  void backward(const Phase& phase, int64_t M, const T* gy, const int64_t* rows, const int64_t* place, const T* w_t,
                T* out, T factor) const {
    out += phase.first_pixel * ldc;
    gemm<T>(M, plan.Cg, phase.taps * plan.Og, {gy, rows, phase.depth}, w_t + phase.first_tap * plan.Og * ldc, ldc,
            Store<T>{out, ldc, ldc, factor, false, place});
  }

 private:
  void pack_center() {
    Carver count{0};
    for (int round = 0; round < 2; ++round) {
      if (round == 1) count = {reinterpret_cast<uintptr_t>(runtime.scratch(kCenterScratch, count.used))};
      T* packed = count.take<T>(weights);
      T* packed_t = call.gram && call.dx ? count.take<T>(weights_t) : nullptr;
      if (round == 0) continue;
      for (int64_t g = 0; g < plan.groups; ++g) {
        const T* from = static_cast<const T*>(call.center) + g * plan.Og * plan.R;
        if (ld != plan.Og) clear(packed + g * plan.R * ld, plan.R * ld);
        transpose<T>(from, plan.R, plan.Og, plan.R, packed + g * plan.R * ld, ld, T(1));
        if (!packed_t) continue;
        T* to = packed_t + g * plan.K * plan.Og * ldc;
        if (ldc != plan.Cg) clear(to, plan.K * plan.Og * ldc);
        transpose_weights(packed + g * plan.R * ld, to);
      }
      center = packed;
      center_t = packed_t;
    }
  }
};

}  // namespace bootgrad::BOOTGRAD_ISA
