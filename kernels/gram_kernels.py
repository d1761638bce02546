"""The kernels of `gram`, which says what each of them computes and in which order they run.

Symmetric matrices are made by pairs of tiles: program p of n(n + 1)/2 takes tile row i = p mod n and tile column
(i + p div n) mod n, so each unordered pair comes once. What is stored is stored twice, as it is and transposed, with rows
padded by zeros to a multiple of 16 columns (``ld``), so that products read whole vectors.

Letters as in `layer`, per group: ``C`` channels in, ``O`` out; ``T`` positions, ``N`` pixels. Pixel of position t at
kernel position k: stride·t + dilation·k − padding.
"""

import triton
import triton.language as tl


@triton.jit
def gram_pixels_kernel(
    x_ptr,
    out_ptr,
    groups,
    C,
    N,
    ld,
    S1,
    S2,
    stride_xb,
    stride_xc,
    stride_x0,
    stride_x1,
    stride_x2,
    FLAT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TF32: tl.constexpr,
):
    """P = X Xᵀ, (samples·groups, N, ld): one program per pair of tiles of a sample's group."""
    i, j, block, _ = _pair(N, BLOCK_T)
    x_ptr += block // groups * stride_xb + block % groups * C * stride_xc
    rows, columns = i * BLOCK_T + tl.arange(0, BLOCK_T), j * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_i = _space(rows, S1, S2, stride_x0, stride_x1, stride_x2, FLAT)
    offs_j = _space(columns, S1, S2, stride_x0, stride_x1, stride_x2, FLAT)
    p = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for start in range(0, C, BLOCK_C):
        p = _dot(x_ptr, offs_i, offs_j, rows < N, columns < N, start, C, stride_xc, p, BLOCK_C, TF32)
    _store_pair(out_ptr + block * N * ld, p, rows, columns, N, ld, i != j)


@triton.jit
def gram_norms_kernel(
    x_ptr,
    gy_ptr,
    pixels_ptr,
    partials_ptr,
    uu_ptr,
    k_ptr,
    groups,
    C,
    O,  # noqa: E741
    T,
    N,
    ld_t,
    ld_n,
    S0,
    S1,
    S2,
    P1,
    P2,
    K0,
    K1,
    K2,
    stride_0,
    stride_1,
    stride_2,
    padding_0,
    padding_1,
    padding_2,
    dilation_0,
    dilation_1,
    dilation_2,
    stride_xb,
    stride_xc,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_gb,
    stride_go,
    stride_g0,
    stride_g1,
    stride_g2,
    PLAIN: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TF32: tl.constexpr,
):
    """Σ (U Uᵀ)∘K over a pair of tiles, and the tiles where they are asked for: one program per pair of a sample's group.

    U Uᵀ is gathered from the pixel Gram if there is one, else made from the patches; K is made from gy. ``PLAIN``: a
    position is a pixel, and x is flat. ``FLAT``: gy is.
    """
    i, j, block, pairs = _pair(T, BLOCK_T)
    sample, group = block // groups, block % groups
    x_ptr += sample * stride_xb + group * C * stride_xc
    gy_ptr += sample * stride_gb + group * O * stride_go
    rows, columns = i * BLOCK_T + tl.arange(0, BLOCK_T), j * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_i, mask_j = rows < T, columns < T

    uu = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    if PLAIN:
        offs_i, offs_j = rows.to(tl.int64) * stride_x2, columns.to(tl.int64) * stride_x2
        for start in range(0, C, BLOCK_C):
            uu = _dot(x_ptr, offs_i, offs_j, mask_i, mask_j, start, C, stride_xc, uu, BLOCK_C, TF32)
    else:
        i0, i1, i2 = _first_pixel(rows, P1, P2, stride_0, stride_1, stride_2, padding_0, padding_1, padding_2)
        j0, j1, j2 = _first_pixel(columns, P1, P2, stride_0, stride_1, stride_2, padding_0, padding_1, padding_2)
        if pixels_ptr is not None:
            pixels_ptr += block * N * ld_n
            for tap in range(0, K0 * K1 * K2):
                k0, k1, k2 = _tap(tap, K1, K2, dilation_0, dilation_1, dilation_2)
                in_i = mask_i & _inside(i0 + k0, i1 + k1, i2 + k2, S0, S1, S2)
                in_j = mask_j & _inside(j0 + k0, j1 + k1, j2 + k2, S0, S1, S2)
                row = (((i0 + k0) * S1 + i1 + k1) * S2 + i2 + k2).to(tl.int64) * ld_n
                column = ((j0 + k0) * S1 + j1 + k1) * S2 + j2 + k2
                mask = in_i[:, None] & in_j[None, :]
                uu += tl.load(pixels_ptr + row[:, None] + column[None, :], mask=mask, other=0.0)
        else:
            blocks = tl.cdiv(C, BLOCK_C)
            for step in range(0, K0 * K1 * K2 * blocks):
                k0, k1, k2 = _tap(step // blocks, K1, K2, dilation_0, dilation_1, dilation_2)
                in_i = mask_i & _inside(i0 + k0, i1 + k1, i2 + k2, S0, S1, S2)
                in_j = mask_j & _inside(j0 + k0, j1 + k1, j2 + k2, S0, S1, S2)
                offs_i = _offset(i0 + k0, i1 + k1, i2 + k2, stride_x0, stride_x1, stride_x2)
                offs_j = _offset(j0 + k0, j1 + k1, j2 + k2, stride_x0, stride_x1, stride_x2)
                start = step % blocks * BLOCK_C
                uu = _dot(x_ptr, offs_i, offs_j, in_i, in_j, start, C, stride_xc, uu, BLOCK_C, TF32)

    offs_i = _space(rows, P1, P2, stride_g0, stride_g1, stride_g2, FLAT)
    offs_j = _space(columns, P1, P2, stride_g0, stride_g1, stride_g2, FLAT)
    k = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for start in range(0, O, BLOCK_C):
        k = _dot(gy_ptr, offs_i, offs_j, mask_i, mask_j, start, O, stride_go, k, BLOCK_C, TF32)

    # A pair of different tiles stands for two: itself and its transpose.
    # One sum over both dimensions: Triton 3.6 fails on a sum of sums of what a Blackwell's tensor memory holds.
    s = tl.sum(uu * k) * tl.where(i == j, 1.0, 2.0)
    tl.store(partials_ptr + tl.program_id(0).to(tl.int64), s)
    if uu_ptr is not None:
        _store_pair(uu_ptr + block * T * ld_t, uu, rows, columns, T, ld_t, i != j)
    if k_ptr is not None:
        _store_pair(k_ptr + block * T * ld_t, k, rows, columns, T, ld_t, i != j)


@triton.jit
def gram_spread_kernel(
    k_ptr,
    out_ptr,
    T,
    N,
    ld_t,
    ld_n,
    S1,
    S2,
    P0,
    P1,
    P2,
    K0,
    K1,
    K2,
    stride_0,
    stride_1,
    stride_2,
    padding_0,
    padding_1,
    padding_2,
    dilation_0,
    dilation_1,
    dilation_2,
    BLOCK_T: tl.constexpr,
):
    """Q[u, u'] = Σ_k K[t, t'], t and t' the positions that meet u and u' with k: one program per pair of tiles of pixels."""
    i, j, block, _ = _pair(N, BLOCK_T)
    k_ptr += block * T * ld_t
    rows, columns = i * BLOCK_T + tl.arange(0, BLOCK_T), j * BLOCK_T + tl.arange(0, BLOCK_T)
    # Minus the padding: position t meets pixel stride·t + dilation·k in the padded input.
    i0, i1, i2 = _first_pixel(rows, S1, S2, 1, 1, 1, -padding_0, -padding_1, -padding_2)
    j0, j1, j2 = _first_pixel(columns, S1, S2, 1, 1, 1, -padding_0, -padding_1, -padding_2)
    q = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for tap in range(0, K0 * K1 * K2):
        k0, k1, k2 = _tap(tap, K1, K2, dilation_0, dilation_1, dilation_2)
        row, in_i = _position(i0 - k0, i1 - k1, i2 - k2, stride_0, stride_1, stride_2, P0, P1, P2)
        column, in_j = _position(j0 - k0, j1 - k1, j2 - k2, stride_0, stride_1, stride_2, P0, P1, P2)
        mask = (in_i & (rows < N))[:, None] & (in_j & (columns < N))[None, :]
        q += tl.load(k_ptr + row.to(tl.int64)[:, None] * ld_t + column[None, :], mask=mask, other=0.0)
    _store_pair(out_ptr + block * N * ld_n, q, rows, columns, N, ld_n, i != j)


@triton.jit
def gram_apply_kernel(
    matrix_ptr,
    v_ptr,
    out_ptr,
    groups,
    C,
    M,
    ld,
    S1,
    S2,
    stride_vb,
    stride_vc,
    stride_v0,
    stride_v1,
    stride_v2,
    stride_ob,
    stride_oc,
    stride_o0,
    stride_o1,
    stride_o2,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    TF32: tl.constexpr,
):
    """Twice the matrix times v, over M positions of a group's C channels: one program per tile."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    block, tile = pid // (tiles_m * tiles_n), (pid % (tiles_m * tiles_n)).to(tl.int32)
    sample, group = block // groups, block % groups
    matrix_ptr += block * M * ld
    v_ptr += sample * stride_vb + group * C * stride_vc
    out_ptr += sample * stride_ob + group * C * stride_oc
    rows = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_c = rows < M, offs_c < C
    row_ptrs = matrix_ptr + rows.to(tl.int64)[:, None] * ld
    v_ptrs = v_ptr + offs_c.to(tl.int64)[None, :] * stride_vc
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, M, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        a = tl.load(row_ptrs + offs_k[None, :], mask=mask_m[:, None] & (offs_k < ld)[None, :], other=0.0).to(DOT)
        offs_v = _space(offs_k, S1, S2, stride_v0, stride_v1, stride_v2, FLAT)
        v = tl.load(v_ptrs + offs_v[:, None], mask=(offs_k < M)[:, None] & mask_c[None, :], other=0.0).to(DOT)
        acc = tl.dot(a, v, acc, input_precision="tf32" if TF32 else "ieee")
    offs_o = _space(rows, S1, S2, stride_o0, stride_o1, stride_o2, FLAT)
    out_ptrs = out_ptr + offs_o[:, None] + offs_c.to(tl.int64)[None, :] * stride_oc
    tl.store(out_ptrs, (2 * acc).to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


@triton.jit
def gram_apply_patches_kernel(
    k_ptr,
    x_ptr,
    out_ptr,
    groups,
    C,
    T,
    ld,
    S0,
    S1,
    S2,
    P0,
    P1,
    P2,
    K0,
    K1,
    K2,
    stride_0,
    stride_1,
    stride_2,
    padding_0,
    padding_1,
    padding_2,
    dilation_0,
    dilation_1,
    dilation_2,
    stride_xb,
    stride_xc,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_ob,
    stride_oc,
    stride_o0,
    stride_o1,
    stride_o2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    TF32: tl.constexpr,
):
    """dx[u] = 2 Σ_k Σ_t' K[t, t'] x[pixel of t' and k], t the position that meets u with k.

    Pixels that leave the same remainder by the stride are met by the same kernel positions: a program takes a tile of
    those and of channels, and walks through the kernel positions that meet them.
    """
    V0, V1, V2 = tl.cdiv(S0, stride_0), tl.cdiv(S1, stride_1), tl.cdiv(S2, stride_2)
    tiles_m, tiles_n = tl.cdiv(V0 * V1 * V2, BLOCK_M), tl.cdiv(C, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    programs = stride_0 * stride_1 * stride_2 * tiles_m * tiles_n
    block, tile = pid // programs, (pid % programs).to(tl.int32)
    sample, group = block // groups, block % groups
    k_ptr += block * T * ld
    x_ptr += sample * stride_xb + group * C * stride_xc
    out_ptr += sample * stride_ob + group * C * stride_oc
    remainder = tile // (tiles_m * tiles_n)
    r0, r1, r2 = remainder // (stride_1 * stride_2), remainder // stride_2 % stride_1, remainder % stride_2
    rows = tile // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    v0, v1, v2 = rows // (V1 * V2), rows // V2 % V1, rows % V2
    u0, u1, u2 = stride_0 * v0 + r0, stride_1 * v1 + r1, stride_2 * v2 + r2
    mask_m = _inside(u0, u1, u2, S0, S1, S2)
    offs_c = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = offs_c < C
    x_ptrs = x_ptr + offs_c.to(tl.int64)[None, :] * stride_xc
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap in range(0, K0 * K1 * K2):
        k0, k1, k2 = _tap(tap, K1, K2, dilation_0, dilation_1, dilation_2)
        e0, e1, e2 = r0 + padding_0 - k0, r1 + padding_1 - k1, r2 + padding_2 - k2
        if (e0 % stride_0 == 0) & (e1 % stride_1 == 0) & (e2 % stride_2 == 0):
            t0, t1, t2 = v0 + e0 // stride_0, v1 + e1 // stride_1, v2 + e2 // stride_2
            mask_t = mask_m & _inside(t0, t1, t2, P0, P1, P2)
            row_ptrs = k_ptr + ((t0 * P1 + t1) * P2 + t2).to(tl.int64)[:, None] * ld
            for start in range(0, T, BLOCK_K):
                offs_k = start + tl.arange(0, BLOCK_K)
                a = tl.load(row_ptrs + offs_k[None, :], mask=mask_t[:, None] & (offs_k < ld)[None, :], other=0.0)
                p0, p1, p2 = _first_pixel(
                    offs_k, P1, P2, stride_0, stride_1, stride_2, padding_0 - k0, padding_1 - k1, padding_2 - k2
                )
                offs_x = _offset(p0, p1, p2, stride_x0, stride_x1, stride_x2)
                mask_k = (offs_k < T) & _inside(p0, p1, p2, S0, S1, S2)
                b = tl.load(x_ptrs + offs_x[:, None], mask=mask_k[:, None] & mask_c[None, :], other=0.0)
                acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision="tf32" if TF32 else "ieee")
    offs_o = _offset(u0, u1, u2, stride_o0, stride_o1, stride_o2)
    out_ptrs = out_ptr + offs_o[:, None] + offs_c.to(tl.int64)[None, :] * stride_oc
    tl.store(out_ptrs, (2 * acc).to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


@triton.jit
def _pair(N, BLOCK: tl.constexpr):
    """This program's tile row and column of an N×N matrix, its matrix, and how many pairs a matrix has."""
    tiles = tl.cdiv(N, BLOCK)
    pairs = tiles * (tiles + 1) // 2
    pid = tl.program_id(0).to(tl.int64)
    pair = (pid % pairs).to(tl.int32)
    i = pair % tiles
    return i, (i + pair // tiles) % tiles, pid // pairs, pairs


@triton.jit
def _dot(ptr, offs_i, offs_j, mask_i, mask_j, start, depth, stride, acc, BLOCK: tl.constexpr, TF32: tl.constexpr):
    """Add Σ_c ptr[offs_i, c] ptr[offs_j, c] to acc, over BLOCK channels from ``start``."""
    offs_c = start + tl.arange(0, BLOCK)
    mask_c, offs_c = offs_c < depth, offs_c.to(tl.int64) * stride
    a = tl.load(ptr + offs_i[:, None] + offs_c[None, :], mask=mask_i[:, None] & mask_c[None, :], other=0.0)
    b = tl.load(ptr + offs_c[:, None] + offs_j[None, :], mask=mask_c[:, None] & mask_j[None, :], other=0.0)
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def _store_pair(ptr, tile, rows, columns, N, ld, different):
    """Store a tile of a symmetric matrix and, if it is not on the diagonal, its transpose; zeros from N to ld."""
    values, pitch = tile.to(ptr.dtype.element_ty), tl.cast(ld, tl.int64)
    ptrs = ptr + rows[:, None] * pitch + columns[None, :]
    tl.store(ptrs, values, mask=(rows < N)[:, None] & (columns < ld)[None, :])
    if different:
        ptrs = ptr + columns[:, None] * pitch + rows[None, :]
        tl.store(ptrs, tl.trans(values), mask=(columns < N)[:, None] & (rows < ld)[None, :])


@triton.jit
def _space(index, S1, S2, stride_0, stride_1, stride_2, FLAT: tl.constexpr):
    """Offsets of a tensor's positions, the last dimension running fastest; FLAT where they are one dimension."""
    if FLAT:
        return index.to(tl.int64) * stride_2
    else:
        return _offset(index // (S1 * S2), index // S2 % S1, index % S2, stride_0, stride_1, stride_2)


@triton.jit
def _offset(i0, i1, i2, stride_0, stride_1, stride_2):
    return i0.to(tl.int64) * stride_0 + i1.to(tl.int64) * stride_1 + i2.to(tl.int64) * stride_2


@triton.jit
def _inside(i0, i1, i2, S0, S1, S2):
    return (i0 >= 0) & (i0 < S0) & (i1 >= 0) & (i1 < S1) & (i2 >= 0) & (i2 < S2)


@triton.jit
def _tap(tap, K1, K2, dilation_0, dilation_1, dilation_2):
    """Where in the patch a kernel position is."""
    return tap // (K1 * K2) * dilation_0, tap // K2 % K1 * dilation_1, tap % K2 * dilation_2


@triton.jit
def _first_pixel(t, P1, P2, stride_0, stride_1, stride_2, padding_0, padding_1, padding_2):
    """The pixel that position t meets with the first kernel position."""
    t0, t1, t2 = t // (P1 * P2), t // P2 % P1, t % P2
    return t0 * stride_0 - padding_0, t1 * stride_1 - padding_1, t2 * stride_2 - padding_2


@triton.jit
def _position(v0, v1, v2, stride_0, stride_1, stride_2, P0, P1, P2):
    """The position that begins at a pixel of the padded input, and whether there is one."""
    whole = (v0 % stride_0 == 0) & (v1 % stride_1 == 0) & (v2 % stride_2 == 0)
    t0, t1, t2 = v0 // stride_0, v1 // stride_1, v2 // stride_2
    return (t0 * P1 + t1) * P2 + t2, whole & (v0 >= 0) & (v1 >= 0) & (v2 >= 0) & _inside(t0, t1, t2, P0, P1, P2)
