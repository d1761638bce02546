// The direct path: a sample's gradient is formed tile by tile, used in registers, and, where derivatives are wanted,
// kept for the two products that they take.
//
//   G[r, o]        = Σ_t x[tap r + pos t] · gy[t, o]
//   ∂s/∂gy[t, o]   = 2 Σ_r x[pos t + tap r] · D[r, o]                 D = G − center
//   ∂s/∂x[p, c]    = 2 Σ_{k,o} gy[(p + padding − dilation·k)/stride, o] · D[(c,k), o]
//
// The last is a sum over the kernel positions that reach pixel p, the same for all pixels of one phase (p modulo the
// stride), so it is the same kind of product as the others.
//
// Where the stride is 1, the two derivatives may have positions as lanes, numbered by their offset in a padded plane: a
// row of B is then a plane of x or gy as it is, shifted, and their planes need no transposition.

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
struct ConvDirect : ConvLayer<In> {
  using Layer = ConvLayer<In>;
  using Layer::call, Layer::plan, Layer::runtime, Layer::ld, Layer::ldc;
  using typename Layer::T;

  explicit ConvDirect(const ConvCall& c) : Layer(c, true) {}

  struct Memory {
    T *x, *gyt, *gyp, *keep, *keep_t, *dgyt, *dxt;
    // Positions as lanes: [Og, ldt] or [Cg, ldp]; numbers 0 …; offsets in D of (k, 0) and o, of c, of r.
    T* planes;
    int64_t *output, *output_depth, *input, *input_depth;
  };

  void run() const {
    // With a sum, a task is a block of samples with its own partial sum; else it is a sample.
    const int64_t weights = this->weights;
    const int64_t blocks = call.sum ? divide<T>(plan.B, 256, plan.groups, weights, ld).blocks : plan.B;
    T* partial = nullptr;
    if (call.sum)
      partial = static_cast<T*>(runtime.scratch(kSharedScratch, static_cast<size_t>(blocks * weights) * sizeof(T)));
    share(
        runtime, blocks, [&](Carver& c) { return lay_out(c); }, [&](const Memory& m) { begin(m); },
        [&](int64_t block, const Memory& m) {
          const Range range = part(plan.B, blocks, block);
          for (int64_t b = range.begin; b < range.end; ++b)
            sample(b, m, call.sum ? partial + block * weights : nullptr, b == range.begin);
        });
    if (call.sum) combine_groups(*this, partial, blocks);
  }

 private:
  const int64_t ldt = plan.T > 0 ? round_up<T>(plan.pos[plan.T - 1] + 1) : 0;
  const bool shifted = (call.dx || call.dgy) && pays(plan, ld, ldt);
  const int64_t ldp = shifted && call.dx ? round_up<T>(plan.phases->rows[plan.pixels - 1] + 1) : 0;

  // Lanes are lost to margins. Tiles of one vector of channels lose more; of others, transposition where sums are
  // short.
  static bool pays(const ConvPlan& plan, int64_t ld, int64_t ldt) {
    if (plan.channels_last || plan.T == 0) return false;
    for (const int64_t stride : plan.stride)
      if (stride != 1) return false;
    return ld == kLanes<T> ? ldt <= 2 * plan.T : plan.R <= 64 && 4 * ldt <= 5 * plan.T;
  }

  Memory lay_out(Carver& c) const {
    Memory m{};
    const int64_t slack = shifted ? kLanes<T> : 0;
    if (this->copy_x || shifted) m.x = c.take<T>(this->x_size + slack);
    m.gyt = c.take<T>(this->gyt_size);
    if (call.dx || call.dgy) m.keep = c.take<T>(plan.R * ld);
    if (shifted) {
      if (call.dx) m.gyp = c.take<T>(this->gy_size + slack);
      m.planes = c.take<T>(plan.Og * ldt > plan.Cg * ldp ? plan.Og * ldt : plan.Cg * ldp);
      m.output = c.take<int64_t>(plan.Og), m.output_depth = c.take<int64_t>(plan.R);
      m.input = c.take<int64_t>(plan.Cg), m.input_depth = c.take<int64_t>(call.dx ? plan.reached * plan.Og : 0);
      return m;
    }
    if (call.dgy) m.dgyt = c.take<T>(plan.T * ld);
    if (call.dx) {
      if (this->copy_gy) m.gyp = c.take<T>(this->gy_size);
      m.keep_t = c.take<T>(plan.K * plan.Og * ldc);
      m.dxt = c.take<T>(plan.pixels * ldc);
    }
    return m;
  }

  void begin(const Memory& m) const {
    const int64_t slack = shifted ? kLanes<T> : 0;
    if (m.x) clear(m.x, this->x_size + slack);
    if (m.gyp) clear(m.gyp, this->gy_size + slack);
    for (int64_t o = 0; o < plan.Og && shifted; ++o) m.output[o] = o;
    for (int64_t r = 0; r < plan.R && shifted; ++r) m.output_depth[r] = r * ld;
    for (int64_t c = 0; c < plan.Cg && shifted; ++c) m.input[c] = c * plan.K * ld;
    for (int64_t k = 0; k < plan.reached && shifted && call.dx; ++k)
      for (int64_t o = 0; o < plan.Og; ++o) m.input_depth[k * plan.Og + o] = plan.tap_order[k] * ld + o;
    if (ld != plan.Og) clear(m.gyt, this->gyt_size);
    if (m.keep_t && ldc != plan.Cg) clear(m.keep_t, plan.K * plan.Og * ldc);
  }

  void sample(int64_t b, const Memory& m, T* sum, bool first) const {
    // Whole vectors are read beyond a sample: of the next ones, or where those end before, of its copy.
    const int64_t smaller = plan.C * plan.pixels < plan.O * plan.T ? plan.C * plan.pixels : plan.O * plan.T;
    const bool last = shifted && (plan.B - b - 1) * smaller < kLanes<T>;
    const T *x = last ? m.x : this->padded_x(b, m.x), *gy = nullptr;
    if (last) pad(this->x_of(b), plan.C, plan.S, m.x, plan.xs, plan.padding);
    if (call.dx) gy = last ? m.gyp : this->padded_gy(b, m.gyp);
    if (call.dx && last) pad(this->gy_of(b), plan.O, plan.P, m.gyp, plan.gs, plan.glow);
    this->transposed_gy(b, m.gyt);
    Total<T> plain, deviation;
    for (int64_t g = 0; g < plan.groups; ++g) {
      const T* xg = x + g * this->x_group();
      const Norms<T> norms{ld,
                           this->center_of(g),
                           sum ? sum + g * plan.R * ld : nullptr,
                           first,
                           m.keep,
                           call.sq_norms ? &plain : nullptr,
                           &deviation};
      gemm<T>(plan.R, plan.Og, plan.T, {xg, plan.tap, plan.pos}, m.gyt + g * plan.T * ld, ld, norms);
      if (shifted) {
        if (call.dgy) shifted_dgy(b, g, xg, m);
        if (call.dx) shifted_dx(b, g, gy + g * this->gy_group(), m);
        continue;
      }
      if (call.dgy) {
        this->forward(plan.T, xg, plan.pos, m.keep, m.dgyt, this->twice);
        this->write_dgy(b, g, m.dgyt, T(1));
      }
      if (call.dx) {
        this->transpose_weights(m.keep, m.keep_t);
        for (int64_t i = 0; i < plan.n_phases; ++i) {
          const Phase& phase = plan.phases[i];
          this->backward(phase, phase.pixels, gy + g * this->gy_group(), phase.rows, phase.out, m.keep_t, m.dxt,
                         this->twice);
        }
        this->write_dx(b, g, m.dxt, T(1));
      }
    }
    if (call.sq_norms) static_cast<T*>(call.sq_norms)[b] = static_cast<T>(plain.value());
    if (call.deviation) static_cast<T*>(call.deviation)[b] = static_cast<T>(deviation.value());
    this->add_bias(b);
  }

  void shifted_dgy(int64_t b, int64_t g, const T* x, const Memory& m) const {
    gemm_of<T>(plan.Og, ldt, plan.R, GatheredBoth<T>{{m.keep, m.output, m.output_depth}, plan.tap}, x, 0,
               Store<T>{m.planes, ldt, ldt, this->twice, false, nullptr});
    write_planes(m.planes, ldt, plan.Og, plan.P, plan.pos,
                 static_cast<In*>(call.dgy) + (b * plan.O + g * plan.Og) * plan.T);
  }

  void shifted_dx(int64_t b, int64_t g, const T* gy, const Memory& m) const {
    const Phase& all = *plan.phases;
    gemm_of<T>(plan.Cg, ldp, all.taps * plan.Og, GatheredBoth<T>{{m.keep, m.input, m.input_depth}, all.depth}, gy, 0,
               Store<T>{m.planes, ldp, ldp, this->twice, false, nullptr});
    write_planes(m.planes, ldp, plan.Cg, plan.S, all.rows,
                 static_cast<In*>(call.dx) + (b * plan.C + g * plan.Cg) * plan.pixels);
  }

  // The positions of `size`, at `place` in a plane, without the gaps between their rows.
  static void write_planes(const T* planes, int64_t ld_planes, int64_t count, const int64_t size[3],
                           const int64_t* place, In* out) {
    const int64_t rows = size[0] * size[1];
    for (int64_t c = 0; c < count; ++c, planes += ld_planes)
      for (int64_t r = 0; r < rows; ++r, out += size[2]) narrow_row(planes + place[r * size[2]], out, size[2]);
  }
};

}  // namespace bootgrad::BOOTGRAD_ISA
