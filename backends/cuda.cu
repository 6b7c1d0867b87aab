// CUDA versions of GELU, SwiGLU, RMSNorm and softmax, forward and backward, float32 and bfloat16.
//
// The same operations as in kernels.py (the formula) and triton_pointwise.py (Triton), once more in the
// language of the machine, so that the three can be held side by side. What Triton does automatically
// is written out here: which thread loads what, how a row is summed across a block, how a type is
// widened. Loaded through NVRTC by cuda.py (--backend=cuda); tests/test_cuda.py
// compiles every kernel for sm_80 and sm_90, without a GPU.
//
// No header is included, so that NVRTC needs no CUDA installation. A launch passes ints as 32 bits
// and floats as double; offsets are 64-bit, since a tensor may have more than 2^31 elements.

typedef unsigned short bf16;                    // the upper half of a float32's bits
typedef long long i64;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __int_as_float((unsigned)x << 16); }

template <typename T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline bf16 narrow<bf16>(float x) {
    unsigned u = __float_as_int(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (u >> 16) | 64;     // NaN stays NaN
    return (u + 0x7fffu + ((u >> 16) & 1)) >> 16;                   // round to nearest even
}

// ------------------------------------------------------------------------ sums across a block

struct Sum { static __device__ float of(float a, float b) { return a + b; } };
struct Max { static __device__ float of(float a, float b) { return fmaxf(a, b); } };

// Reduce one float a thread over the whole block; every thread gets the result. The 32 lanes of a
// warp exchange registers by shuffles; the warps (at most 32) meet once in shared memory.
template <typename Op> __device__ float reduce(float x, float neutral) {
    __shared__ float part[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    for (int step = 16; step; step >>= 1) x = Op::of(x, __shfl_xor_sync(~0u, x, step));
    __syncthreads();                            // a call before this one may still be reading part
    if (lane == 0) part[warp] = x;
    __syncthreads();
    x = lane < warps ? part[lane] : neutral;
    for (int step = 16; step; step >>= 1) x = Op::of(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// ------------------------------------------------------------------------------- activations

// gelu(x) = x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2;    gelu' = Phi(x) + x phi(x)
__device__ inline float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }
__device__ inline float gelu_slope(float x) {
    return 0.5f * (1 + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
}

// silu(x) = x s, s = sigmoid(x);                              silu' = s (1 + x (1 - s))
__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// One thread an element; `count` is (rows, cols) so that the product may exceed 32 bits.
__device__ inline i64 element() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }

template <typename T> __device__ void gelu_forward(const T* x, T* y, int rows, int cols) {
    i64 i = element();
    if (i < (i64)rows * cols) y[i] = narrow<T>(gelu(widen(x[i])));
}

template <typename T>
__device__ void gelu_backward(const T* dy, const T* x, T* dx, int rows, int cols) {
    i64 i = element();
    if (i < (i64)rows * cols) dx[i] = narrow<T>(widen(dy[i]) * gelu_slope(widen(x[i])));
}

// y = silu(gate) up. The backward keeps the two inputs only and computes the sigmoid again.
template <typename T>
__device__ void swiglu_forward(const T* gate, const T* up, T* y, int rows, int cols) {
    i64 i = element();
    if (i >= (i64)rows * cols) return;
    float g = widen(gate[i]);
    y[i] = narrow<T>(g * sigmoid(g) * widen(up[i]));
}

template <typename T>
__device__ void swiglu_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup,
                                int rows, int cols) {
    i64 i = element();
    if (i >= (i64)rows * cols) return;
    float d = widen(dy[i]), g = widen(gate[i]), s = sigmoid(g);
    dup[i] = narrow<T>(d * g * s);
    dgate[i] = narrow<T>(d * widen(up[i]) * s * (1 + g * (1 - s)));
}

// ---------------------------------------------------------------------------------- RMSNorm

// y = x r (offset + w), r = 1 / sqrt(mean(x^2) + eps). A block a row; r is kept for the backward.
template <typename T>
__device__ void rms_norm_forward(const T* x, const float* w, T* y, float* rstd, int cols,
                                 double eps, double offset) {
    i64 row = (i64)blockIdx.x * cols;
    float sum = 0;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        float v = widen(x[row + c]);
        sum += v * v;
    }
    float r = rsqrtf(reduce<Sum>(sum, 0) / cols + (float)eps);
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
        y[row + c] = narrow<T>(widen(x[row + c]) * r * ((float)offset + w[c]));
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

// With n = x r and dn = dy (offset + w):  dx = r (dn - n mean(dn n)),  dw = sum over rows of dy n.
// Block b walks rows b, b + blocks, … and adds its dw up in row b of `partial` (blocks, cols)
// float32, which the caller sums: no atomics, so the result is the same in every run.
template <typename T>
__device__ void rms_norm_backward(const T* dy, const T* x, const float* w, const float* rstd,
                                  T* dx, float* partial, int rows, int cols, double offset) {
    for (int c = threadIdx.x; c < cols; c += blockDim.x) partial[(i64)blockIdx.x * cols + c] = 0;
    for (int i = blockIdx.x; i < rows; i += gridDim.x) {
        i64 row = (i64)i * cols;
        float r = rstd[i], sum = 0;
        for (int c = threadIdx.x; c < cols; c += blockDim.x) {
            float n = widen(x[row + c]) * r, d = widen(dy[row + c]);
            sum += d * ((float)offset + w[c]) * n;
            partial[(i64)blockIdx.x * cols + c] += d * n;      // this thread's column, every row
        }
        float mean = reduce<Sum>(sum, 0) / cols;
        for (int c = threadIdx.x; c < cols; c += blockDim.x) {
            float n = widen(x[row + c]) * r, dn = widen(dy[row + c]) * ((float)offset + w[c]);
            dx[row + c] = narrow<T>(r * (dn - n * mean));
        }
    }
}

// ---------------------------------------------------------------------------------- softmax

// p = exp(x - max) / sum exp(x - max). A block a row, in one pass over x for both (online: a new
// maximum m' scales the sum so far by exp(m - m'); Milakov 2018), and one to write.
template <typename T> __device__ void softmax_forward(const T* x, T* p, int cols) {
    i64 row = (i64)blockIdx.x * cols;
    float top = -3.4e38f, sum = 0;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        float v = widen(x[row + c]), m = fmaxf(top, v);
        sum = sum * expf(top - m) + expf(v - m);
        top = m;
    }
    float m = reduce<Max>(top, -3.4e38f);
    float all = reduce<Sum>(sum * expf(top - m), 0);
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
        p[row + c] = narrow<T>(expf(widen(x[row + c]) - m) / all);
}

// dx = p (dp - sum(dp p))
template <typename T>
__device__ void softmax_backward(const T* dp, const T* p, T* dx, int cols) {
    i64 row = (i64)blockIdx.x * cols;
    float sum = 0;
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
        sum += widen(dp[row + c]) * widen(p[row + c]);
    sum = reduce<Sum>(sum, 0);
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
        dx[row + c] = narrow<T>(widen(p[row + c]) * (widen(dp[row + c]) - sum));
}

// ------------------------------------------------------------- names that a launch can look up

#define TWIN(T, type)                                                                              \
    extern "C" __global__ void gelu_forward_##type(const T* x, T* y, int rows, int cols) {         \
        gelu_forward(x, y, rows, cols); }                                                          \
    extern "C" __global__ void gelu_backward_##type(const T* dy, const T* x, T* dx, int rows,      \
                                                    int cols) {                                    \
        gelu_backward(dy, x, dx, rows, cols); }                                                    \
    extern "C" __global__ void swiglu_forward_##type(const T* gate, const T* up, T* y, int rows,   \
                                                     int cols) {                                   \
        swiglu_forward(gate, up, y, rows, cols); }                                                 \
    extern "C" __global__ void swiglu_backward_##type(const T* dy, const T* gate, const T* up,     \
                                                      T* dgate, T* dup, int rows, int cols) {      \
        swiglu_backward(dy, gate, up, dgate, dup, rows, cols); }                                   \
    extern "C" __global__ void rms_norm_forward_##type(const T* x, const float* w, T* y,           \
                                                       float* rstd, int cols, double eps,          \
                                                       double offset) {                            \
        rms_norm_forward(x, w, y, rstd, cols, eps, offset); }                                      \
    extern "C" __global__ void rms_norm_backward_##type(                                           \
            const T* dy, const T* x, const float* w, const float* rstd, T* dx, float* partial,     \
            int rows, int cols, double offset) {                                                   \
        rms_norm_backward(dy, x, w, rstd, dx, partial, rows, cols, offset); }                      \
    extern "C" __global__ void softmax_forward_##type(const T* x, T* p, int cols) {                \
        softmax_forward(x, p, cols); }                                                             \
    extern "C" __global__ void softmax_backward_##type(const T* dp, const T* p, T* dx, int cols) { \
        softmax_backward(dp, p, dx, cols); }

TWIN(float, float32)
TWIN(bf16, bfloat16)
