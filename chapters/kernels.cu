// The kernels of cuda_kernels.py. Number is float, bfloat16 or float16; widen and narrow turn it
// into a float and back. A thread reads and writes WIDTH numbers at once: 8, which memory is fast
// with, or 1 where rows have another length.

typedef long long Int;  // offsets can exceed 2^31
struct alignas(WIDTH * sizeof(Number)) Pack { Number at[WIDTH]; };
struct alignas(WIDTH * sizeof(float)) Floats { float at[WIDTH]; };
extern __shared__ float shared[];  // the first 32 belong to over_block()
#define MINE(n, lanes) for (int i = threadIdx.x % (lanes); i < (n); i += (lanes))  // part of a row
#define EACH for (int k = 0; k < WIDTH; k++)                                       // of a pack

// The sum of x, or the largest, over each group of so many threads, a power of 2 up to 32.
__device__ float over_lanes(float x, int lanes, bool largest = false) {
    for (int step = lanes / 2; step; step /= 2) {
        const float other = __shfl_xor_sync(~0u, x, step);
        x = largest ? fmaxf(x, other) : x + other;
    }
    return x;
}

// The same over the threads of the block; all get it.
__device__ float over_block(float x, bool largest = false) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = over_lanes(x, 32, largest);
    __syncthreads();  // all have read what the last call left
    if (lane == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    return over_lanes(lane < warps ? shared[lane] : largest ? -3e38f : 0, 32, largest);
}

// A group of lanes for each row n: y is the norm of x; stats: the row's mean and scale.
extern "C" __global__ void norm_forward(const Pack* x, const Floats* weight, const Floats* bias,
        Pack* y, float* stats, int rows, int C, int lanes, int center, float eps) {
    const int group = (blockIdx.x * blockDim.x + threadIdx.x) / lanes, size = C / WIDTH;
    const Int n = group < rows ? group : rows - 1;  // shuffles need all threads: some do it again
    x += n * size, y += n * size;
    float total = 0, mean = 0;
    if (center) {  // not E[x^2] - E[x]^2: few digits would be left
        MINE(size, lanes) {
            const Pack a = x[i];
            EACH total += widen(a.at[k]);
        }
        mean = over_lanes(total, lanes) / C, total = 0;
    }
    MINE(size, lanes) {
        const Pack a = x[i];
        EACH total += (widen(a.at[k]) - mean) * (widen(a.at[k]) - mean);
    }
    const float scale = rsqrtf(over_lanes(total, lanes) / C + eps);
    if (threadIdx.x % lanes == 0) stats[2 * n] = mean, stats[2 * n + 1] = scale;
    MINE(size, lanes) {
        const Pack a = x[i];
        const Floats w = weight[i], b = bias ? bias[i] : Floats{};
        Pack out;
        EACH narrow((widen(a.at[k]) - mean) * scale * w.at[k] + b.at[k], out.at[k]);
        y[i] = out;
    }
}

// The groups of a block go through some rows, and the block sums d_weight, and where n_params is 2
// d_bias, of these: d_params (blocks, n_params, C). Until then each group has its own sums, side by
// side in shared memory. Without __restrict__ no load could overtake a store to it.
extern "C" __global__ void norm_backward(const Pack* __restrict__ d_y, const Pack* __restrict__ x,
        const Floats* __restrict__ weight, const float* __restrict__ stats, Pack* d_x,
        float* d_params, int rows, int C, int lanes, int center, int n_params) {
    const int groups = blockDim.x / lanes, group = threadIdx.x / lanes, size = C / WIDTH;
    float *d_w = shared + 32 + group, *d_b = d_w + C * groups;
    MINE(n_params * C * groups, blockDim.x) shared[32 + i] = 0;
    __syncthreads();
    for (int first = blockIdx.x * groups; first < rows; first += gridDim.x * groups) {
        const bool real = first + group < rows;
        const Int n = real ? first + group : rows - 1, row = n * size;
        const float mean = stats[2 * n], scale = stats[2 * n + 1];
        float along = 0, total = 0;
        MINE(size, lanes) {
            const Pack a = x[row + i], d_a = d_y[row + i];
            const Floats w = weight[i];
            EACH {
                const float unit = (widen(a.at[k]) - mean) * scale, d = real ? widen(d_a.at[k]) : 0;
                d_w[(k * size + i) * groups] += d * unit;
                if (n_params == 2) d_b[(k * size + i) * groups] += d;
                along += d * w.at[k] * unit, total += d * w.at[k];
            }
        }
        // what would only lengthen or shift x changes nothing
        along = over_lanes(along, lanes) / C;
        total = center ? over_lanes(total, lanes) / C : 0;
        if (real) MINE(size, lanes) {
            const Pack a = x[row + i], d_a = d_y[row + i];
            const Floats w = weight[i];
            Pack out;
            EACH {
                const float unit = (widen(a.at[k]) - mean) * scale;
                narrow((widen(d_a.at[k]) * w.at[k] - total - unit * along) * scale, out.at[k]);
            }
            d_x[row + i] = out;
        }
    }
    __syncthreads();
    MINE(n_params * C, blockDim.x) {
        const int column = i % C, place = i - column + column % WIDTH * size + column / WIDTH;
        float sum = 0;
        for (int j = 0; j < groups; j++) sum += shared[32 + place * groups + j];
        d_params[(Int)blockIdx.x * n_params * C + i] = sum;
    }
}

// A thread for each pack of pairs: y is x rotated by the angles of its position, or back where way
// is -1.
extern "C" __global__ void rotate(const Pack* x, Pack* y, const Floats* cos, const Floats* sin,
        int rows, int D, int heads, int positions, int way) {
    const unsigned half = D / 2 / WIDTH, thread = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned row = thread / half, i = thread % half;
    if (row >= rows) return;
    const Int angles = (Int)(row / heads % positions) * half + i;
    const Int first = (Int)row * 2 * half + i, second = first + half;
    const Pack a = x[first], b = x[second];
    const Floats c = cos[angles], s = sin[angles];
    Pack left, right;
    EACH {
        narrow(widen(a.at[k]) * c.at[k] - widen(b.at[k]) * s.at[k] * way, left.at[k]);
        narrow(widen(b.at[k]) * c.at[k] + widen(a.at[k]) * s.at[k] * way, right.at[k]);
    }
    y[first] = left, y[second] = right;
}

// A block turns a row of V logits into the row's loss, and if learn into their gradient in place.
// Rows are padded to whole packs; what is written there meets weights of 0.
__device__ float cap(float x, float softcap) { return softcap ? softcap * tanhf(x / softcap) : x; }
extern "C" __global__ void loss(Pack* logits, const Int* targets, float* losses, int V,
        int stride, int learn, float softcap, float smoothing, float z_loss) {
    logits += (Int)blockIdx.x * (stride / WIDTH);
    const int target = targets[blockIdx.x], size = (V + WIDTH - 1) / WIDTH;
    const float hit = target < 0 ? 0 : cap(widen(((Number*)logits)[target]), softcap);
    float row_max = -3e38f, total = 0, mean = 0;
    MINE(size, blockDim.x) {
        const Pack a = logits[i];
        float x[WIDTH], top = row_max;
        EACH {
            const bool real = i * WIDTH + k < V;
            x[k] = real ? cap(widen(a.at[k]), softcap) : -3e38f;
            mean += real ? x[k] : 0, top = fmaxf(top, x[k]);
        }
        total *= __expf(row_max - top), row_max = top;
        EACH total += __expf(x[k] - top);
    }
    const float top = over_block(row_max, true);
    const float logsumexp = top + logf(over_block(total * __expf(row_max - top)));
    mean = over_block(mean) / V;
    if (threadIdx.x == 0) losses[blockIdx.x] = target < 0 ? 0 : logsumexp
        - (1 - smoothing) * hit - smoothing * mean + z_loss * logsumexp * logsumexp;
    if (learn) MINE(size, blockDim.x) {
        const Pack a = logits[i];
        Pack out;
        EACH {
            const float logit = cap(widen(a.at[k]), softcap);
            float d = __expf(logit - logsumexp) * (1 + 2 * z_loss * logsumexp) - smoothing / V;
            if (i * WIDTH + k == target) d -= 1 - smoothing;
            if (softcap) d *= 1 - logit / softcap * (logit / softcap);
            narrow(target < 0 ? 0 : d, out.at[k]);
        }
        logits[i] = out;
    }
}
