// The kernels of cuda_kernels.py. Number is float, bfloat16 or float16; widen and narrow turn it
// into a float and back.

typedef long long Int;  // offsets can exceed 2^31
extern __shared__ float shared[];  // the first 32 belong to over_block()
#define MINE(n) for (Int i = threadIdx.x; i < (n); i += blockDim.x)  // this thread's part of a row

// The sum of x over the threads of the block, or the largest; all get it.
__device__ float over_block(float x, bool largest = false) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int again = 1; again >= 0; again--) {
        for (int step = 16; step; step /= 2) {
            const float other = __shfl_xor_sync(~0u, x, step);
            x = largest ? fmaxf(x, other) : x + other;
        }
        if (!again) break;
        __syncthreads();  // all have read what the last call left
        if (lane == 0) shared[threadIdx.x / 32] = x;
        __syncthreads();
        x = lane < warps ? shared[lane] : largest ? -3e38f : 0;
    }
    return x;
}

// A block for each row n: y is the norm of x; stats: the row's mean and scale.
extern "C" __global__ void norm_forward(const Number* x, const float* weight, const float* bias,
        Number* y, float* stats, Int C, Int center, float eps) {
    const Int n = blockIdx.x;
    x += n * C, y += n * C;
    float total = 0, mean = 0;
    if (center) {  // not E[x^2] - E[x]^2: few digits would be left
        MINE(C) total += widen(x[i]);
        mean = over_block(total) / C;
        total = 0;
    }
    MINE(C) total += (widen(x[i]) - mean) * (widen(x[i]) - mean);
    const float scale = rsqrtf(over_block(total) / C + eps);
    if (threadIdx.x == 0) stats[2 * n] = mean, stats[2 * n + 1] = scale;
    MINE(C) narrow((widen(x[i]) - mean) * scale * weight[i] + (bias ? bias[i] : 0), y[i]);
}

// Each block goes through some rows, and sums d_weight and d_bias of them: d_params (blocks, 2, C).
extern "C" __global__ void norm_backward(const Number* d_y, const Number* x, const float* weight,
        const float* stats, Number* d_x, float* d_params, Int rows, Int C, Int center) {
    float *d_w = shared + 32, *d_b = d_w + C;
    MINE(C) d_w[i] = d_b[i] = 0;
    for (Int n = blockIdx.x; n < rows; n += gridDim.x) {
        const Int row = n * C;
        const float mean = stats[2 * n], scale = stats[2 * n + 1];
        float along = 0, total = 0;
        MINE(C) {
            const float unit = (widen(x[row + i]) - mean) * scale, d = widen(d_y[row + i]);
            d_w[i] += d * unit, d_b[i] += d;
            along += d * weight[i] * unit, total += d * weight[i];
        }
        along = over_block(along) / C;  // what would only lengthen or shift x changes nothing
        total = center ? over_block(total) / C : 0;
        MINE(C) {
            const float unit = (widen(x[row + i]) - mean) * scale;
            narrow((widen(d_y[row + i]) * weight[i] - total - unit * along) * scale, d_x[row + i]);
        }
    }
    MINE(C) {
        d_params[blockIdx.x * 2 * C + i] = d_w[i];
        d_params[blockIdx.x * 2 * C + C + i] = d_b[i];
    }
}

// A block for each row: y is x rotated by the angles of its position, or back where way is -1.
extern "C" __global__ void rotate(const Number* x, Number* y, const float* cos, const float* sin,
        Int D, Int heads, Int positions, Int way) {
    const Int row = (Int)blockIdx.x * D, half = D / 2;
    const Int angles = (unsigned)blockIdx.x / (unsigned)heads % (unsigned)positions * half;
    MINE(half) {
        const float a = widen(x[row + i]), b = widen(x[row + half + i]);
        const float c = cos[angles + i], s = way * sin[angles + i];
        narrow(a * c - b * s, y[row + i]);
        narrow(b * c + a * s, y[row + half + i]);
    }
}

// A block turns a row of V logits into the row's loss, and if learn into their gradient in place.
__device__ float cap(float x, float softcap) { return softcap ? softcap * tanhf(x / softcap) : x; }
extern "C" __global__ void loss(Number* logits, const Int* targets, float* losses, Int V,
        Int stride, Int learn, float softcap, float smoothing, float z_loss) {
    logits += blockIdx.x * stride;
    const Int target = targets[blockIdx.x];
    const float hit = target < 0 ? 0 : cap(widen(logits[target]), softcap);
    float row_max = -3e38f, total = 0, mean = 0;
    MINE(V) {
        const float logit = cap(widen(logits[i]), softcap);
        if (logit > row_max) total *= expf(row_max - logit), row_max = logit;
        total += expf(logit - row_max), mean += logit;
    }
    const float top = over_block(row_max, true);
    const float logsumexp = top + logf(over_block(total * expf(row_max - top)));
    mean = over_block(mean) / V;
    if (threadIdx.x == 0) losses[blockIdx.x] = target < 0 ? 0 : logsumexp
        - (1 - smoothing) * hit - smoothing * mean + z_loss * logsumexp * logsumexp;
    if (learn) MINE(V) {
        const float logit = cap(widen(logits[i]), softcap);
        float d = expf(logit - logsumexp) * (1 + 2 * z_loss * logsumexp) - smoothing / V;
        if (i == target) d -= 1 - smoothing;
        if (softcap) d *= 1 - logit / softcap * (logit / softcap);
        narrow(target < 0 ? 0 : d, logits[i]);
    }
}
