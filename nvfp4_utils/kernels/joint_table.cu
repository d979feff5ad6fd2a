// SPDX-License-Identifier: Apache-2.0
// Copyright The NVFP4 Calibration Book authors
//
// The joint histogram in shared memory; cuda.py compiles and launches it, and says what it does.

typedef unsigned long long u64;
typedef long long i64;

// A window of codes comes as {0x7fff - lowest, highest}, as block_codes reports it; one too wide for
// a table of `limit` rows counts nothing.
struct Window { int base, rows; };
__device__ Window read_window(const int* window, int limit)
{
    int base = 0x7fff - window[0], rows = max(0, window[1] - base + 1);
    return {base, rows > limit ? 0 : rows};
}

// Codes are int16: 0 a block of zeros, negative one that has no place in the table; eight are read
// at once. Each program takes the same part of them here and in sort_blocks.
extern "C" __global__ void count_rows(
    const int4* codes, int n, const int* window, int limit, int* counts, int* offsets)
{
    __shared__ int bins[MAX_ROWS];
    auto [base, rows] = read_window(window, limit);
    if (!rows) return;
    for (int r = threadIdx.x; r < rows; r += blockDim.x) bins[r] = 0;
    __syncthreads();
    int groups = (n + 7) / 8, share = (groups + gridDim.x - 1) / gridDim.x;
    int first = min(groups, (int)blockIdx.x * share), last = min(groups, first + share);
    for (int i = first + threadIdx.x; i < last; i += blockDim.x) {
        int4 eight = codes[i];
        const short* code = (const short*)&eight;
        #pragma unroll
        for (int k = 0; k < 8; ++k)
            if (code[k] > 0) atomicAdd(&bins[code[k] - base], 1);
    }
    __syncthreads();
    // The atomic's old value is where this program's blocks of the row begin.
    for (int r = threadIdx.x; r < rows; r += blockDim.x)
        if (bins[r]) offsets[blockIdx.x * MAX_ROWS + r] = atomicAdd(&counts[r], bins[r]);
}

// The exclusive prefix sum of each thread's value over the program, and the sum of all.
__device__ u64 scan(u64 own, u64* total)
{
    __shared__ u64 sums[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = own;
    for (int d = 1; d < 32; d *= 2) {
        u64 lower = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += lower;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    sum -= own;
    *total = 0;
    for (int w = 0; w < blockDim.x / 32; ++w) {
        if (w < warp) sum += sums[w];
        *total += sums[w];
    }
    __syncthreads();
    return sum;
}

// starts[r]: where row r begins in order; starts[rows]: blocks of rows with at least FEW blocks,
// which come first; starts[rows + 1]: all blocks. A tile is sorted in shared memory first, so that
// a row's blocks are written side by side.
extern "C" __global__ void __launch_bounds__(SORT_THREADS) sort_blocks(
    const int4* codes, int n, const int* window, int limit, const int* counts, const int* offsets,
    int* starts, int* order)
{
    extern __shared__ int next[];
    auto [base, rows] = read_window(window, limit);
    if (!rows) return;
    int *found = next + rows, *begins = found + rows;
    __shared__ int sorted[TILE];
    __shared__ short sorted_row[TILE];
    int span = (rows + SORT_THREADS - 1) / SORT_THREADS;
    int first_row = min(rows, (int)threadIdx.x * span), last_row = min(rows, first_row + span);
    u64 own = 0, total;  // of large rows in the low, of small ones in the high 32 bits
    for (int r = first_row; r < last_row; ++r) own += (u64)counts[r] << (counts[r] < FEW ? 32 : 0);
    u64 sum = scan(own, &total);
    int large = (int)total;
    for (int r = first_row; r < last_row; ++r) {
        int few = counts[r] < FEW;
        int start = few ? large + (int)(sum >> 32) : (int)sum;
        next[r] = start + offsets[blockIdx.x * MAX_ROWS + r];  // unset where never used
        found[r] = 0;
        if (blockIdx.x == 0) starts[r] = start;
        sum += (u64)counts[r] << (few ? 32 : 0);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        starts[rows] = large;
        starts[rows + 1] = large + (int)(total >> 32);
    }
    int groups = (n + 7) / 8, share = (groups + gridDim.x - 1) / gridDim.x;
    int first = min(groups, (int)blockIdx.x * share), last = min(groups, first + share);
    for (int tile = first; tile < last; tile += TILE / 8) {
        __syncthreads();
        short code[TILE / SORT_THREADS];
        short rank[TILE / SORT_THREADS];
        #pragma unroll
        for (int j = 0; j < TILE / SORT_THREADS / 8; ++j) {
            int i = tile + j * SORT_THREADS + threadIdx.x;
            int4 eight = i < last ? codes[i] : make_int4(0, 0, 0, 0);
            #pragma unroll
            for (int k = 0; k < 8; ++k) {
                int c = ((const short*)&eight)[k], same, lane = threadIdx.x % 32;
                code[8 * j + k] = c;
                __match_all_sync(~0u, c, &same);
                if (!same) {
                    if (c > 0) rank[8 * j + k] = atomicAdd(&found[c - base], 1);
                } else if (c > 0) {  // one atomic for the warp, or equal blocks would queue up
                    int at = lane ? 0 : atomicAdd(&found[c - base], 32);
                    rank[8 * j + k] = __shfl_sync(~0u, at, 0) + lane;
                }
            }
        }
        __syncthreads();
        u64 own = 0, placed;
        for (int r = first_row; r < last_row; ++r) own += found[r];
        int begin = (int)scan(own, &placed);
        for (int r = first_row; r < last_row; ++r) {
            begins[r] = begin;
            begin += found[r];
        }
        __syncthreads();
        #pragma unroll
        for (int j = 0; j < TILE / SORT_THREADS; ++j) {
            int row = code[j] - base;
            if (code[j] > 0) {
                int at = begins[row] + rank[j];
                sorted[at] = 8 * (tile + j / 8 * SORT_THREADS + threadIdx.x) + j % 8;
                sorted_row[at] = row;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < (int)placed; i += SORT_THREADS) {
            int row = sorted_row[i];
            order[next[row] + i - begins[row]] = sorted[i];
        }
        __syncthreads();
        for (int r = first_row; r < last_row; ++r) {
            next[r] += found[r];
            found[r] = 0;
        }
    }
}

extern "C" __global__ void __launch_bounds__(PAIR_THREADS) count_pairs(
    const uint4* x, const short* codes, const int* order, const int* counts, const int* starts,
    const int* window, int limit, int* table)
{
    __shared__ int bins[COLUMNS];
    auto [base, rows] = read_window(window, limit);
    if (!rows) return;
    for (int i = threadIdx.x; i < COLUMNS; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    int large = starts[rows], total = starts[rows + 1];
    int share = (large + gridDim.x - 1) / gridDim.x;
    int begin = min(large, (int)blockIdx.x * share), end = min(large, begin + share);
    while (begin < end) {  // one row, or what this program has of it, at a time
        int row = codes[order[begin]] - base;
        int stop = min(end, starts[row] + counts[row]);
        int shift = COLUMNS - 1 - (row + base);
        // Two threads a block: each 32-byte sector is one access.
        const uint4* half = x + threadIdx.x % 2;
        for (int p = begin + threadIdx.x / 2; p < stop; p += AHEAD * PAIR_THREADS / 2) {
            uint4 eight[AHEAD];
            #pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                int at = p + j * PAIR_THREADS / 2;
                if (at < stop) eight[j] = half[2 * (i64)order[at]];
            }
            #pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                if (p + j * PAIR_THREADS / 2 >= stop) break;
                const unsigned* two = (const unsigned*)&eight[j];
                #pragma unroll
                for (int k = 0; k < 4; ++k) {
                    int a = two[k] & 0x7fff, b = (two[k] >> 16) & 0x7fff;
                    // Compiles to ATOMS.POPC.INC: lanes with one address count as one access.
                    atomicAdd(&bins[a ? a + shift : 0], 1);
                    atomicAdd(&bins[b ? b + shift : 0], 1);
                }
            }
        }
        __syncthreads();
        int* out = table + (i64)row * COLUMNS;
        for (int i = 4 * threadIdx.x; i < COLUMNS; i += 4 * blockDim.x) {
            int4 four = *(int4*)(bins + i);
            if (four.x) atomicAdd(out + i, four.x);
            if (four.y) atomicAdd(out + i + 1, four.y);
            if (four.z) atomicAdd(out + i + 2, four.z);
            if (four.w) atomicAdd(out + i + 3, four.w);
            *(int4*)(bins + i) = make_int4(0, 0, 0, 0);
        }
        __syncthreads();
        begin = stop;
    }
    for (int p = large + blockIdx.x * blockDim.x + threadIdx.x; p < total; p += gridDim.x * blockDim.x) {
        const uint4* block = x + 2 * (i64)order[p];
        uint4 half[2] = {block[0], block[1]};
        const unsigned* two = (const unsigned*)half;
        int code = codes[order[p]], shift = COLUMNS - 1 - code;
        int* out = table + (i64)(code - base) * COLUMNS;
        for (int k = 0; k < 8; ++k) {
            int a = two[k] & 0x7fff, b = (two[k] >> 16) & 0x7fff;
            atomicAdd(out + (a ? a + shift : 0), 1);
            atomicAdd(out + (b ? b + shift : 0), 1);
        }
    }
}

// Nonzero cells of each row, and of all.
extern "C" __global__ void count_cells(const int4* table, const int* window, i64* cells, int* all)
{
    int mine = 0;
    if (blockIdx.x < read_window(window, gridDim.x).rows)
        for (int i = threadIdx.x; i < COLUMNS / 4; i += blockDim.x) {
            int4 four = table[(i64)blockIdx.x * (COLUMNS / 4) + i];
            mine += (four.x != 0) + (four.y != 0) + (four.z != 0) + (four.w != 0);
        }
    u64 total;
    scan(mine, &total);
    if (threadIdx.x == 0) {
        cells[blockIdx.x] = total;
        if (total) atomicAdd(all, (int)total);
    }
}

// Keys and counts of nonzero cells in order; ends[r]: cells of rows up to and with r.
extern "C" __global__ void list_cells(
    const int* table, const i64* ends, const int* window, i64* keys, i64* counts)
{
    i64 at = blockIdx.x ? ends[blockIdx.x - 1] : 0;
    if (at == ends[blockIdx.x]) return;
    int code = read_window(window, gridDim.x).base + blockIdx.x;
    for (int i = 4 * threadIdx.x; i < COLUMNS; i += 4 * blockDim.x) {
        int4 four = *(const int4*)(table + (i64)blockIdx.x * COLUMNS + i);
        int cell[4] = {four.x, four.y, four.z, four.w};
        u64 total, own = (cell[0] != 0) + (cell[1] != 0) + (cell[2] != 0) + (cell[3] != 0);
        i64 to = at + scan(own, &total);
        for (int k = 0; k < 4; ++k)
            if (cell[k]) {
                int element = i + k ? i + k + code - (COLUMNS - 1) : 0;
                keys[to] = (i64)code << 15 | element;
                counts[to++] = cell[k];
            }
        at += total;
    }
}
