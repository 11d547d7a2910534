// Decode of many rows: an expert's MXFP4 products for up to 8·MAX_NT pairs of a row and an expert
// on the int8 tensor cores, each weight loaded and unpacked once for all of them.
//
// Products, shapes and results: pair_product.cuh, for weights of type MXFP4 with a multiple of 32
// rows and of 64 columns, at least 512.
// Grid: x over equal shares of the work, any number; 640 threads. The work is the chunks of all
// tiles (expert_tiles.cuh, experts_mma_stages.cuh): 32 elements of h, or 32 rows of W. 16 warps
// share the units of a stage's 16 rows, of which with GATED 8 are of gate and 8 of up; 4 finish.
// Alignment: planes and q 16 bytes. Dynamic shared memory: `MmaShared`. Bytes: the weights of each
// distinct expert once for each of its tiles, in bulk copies of 4 whole rows, all slots in flight.
// Order and rounding: the bits of glu.cu with experts and of the products of experts_add.cu. Warp w
// adds chains w and w + 16 (bit 16 of the butterfly over 32 chains, vec_dot.cuh), then the warps
// are added through shared memory (bits 8 to 1).
// scale·sum is one fma that subtracts scale·kIntBias, which is exact unless it overflows: a warp
// with a sum that is not finite computes it again and subtracts first. Only a zero's sign may
// differ, which no sum keeps.
// Twins: `experts_glu`, `experts_add` in worker/cpu/ops.py; tests/quantized_ops.py. Launcher:
// worker/gpu/decode_experts.py.
#include "experts_mma_handoff.cuh"
#include "experts_mma_slices.cuh"
#include "pdl.cuh"

// A multiplier multiplies its slice of each stage.
template <int MAX_NT>
struct Multiplier {
    const PairProduct& p;
    MmaShared<MAX_NT>& shared;
    const int units;
    const Fp4Unpacker unpacker;
    const StageReader reader;
    Handoff<MAX_NT> handoff;

    __device__ __forceinline__ Multiplier(const PairProduct& p, MmaShared<MAX_NT>& shared, int warp)
        : p(p), shared(shared), units(p.cols / 32), unpacker((u32)(p.rows + (int)threadIdx.x) >> 31),
          reader(warp, units), handoff(shared) {}

    template <int NT>
    __device__ __forceinline__ void multiply_chunk(int stages, int number) {
        constexpr bool kStarts = kNarrow<MAX_NT>;
        const auto* const x = shared.template x<NT>(units);
        const int4 bias = kStarts ? int4{} : shared.bias.load();
        const Partials partials{shared.partials, NT};
#pragma unroll 1
        for (int stage = 0; stage < stages; ++stage) {
            const u8* const bytes = shared.ring() + handoff.wait_for_stage() * stage_bytes(units);
            const u32 slot = (u32)__cvta_generic_to_shared(bytes);
            LaneSums<NT> sums;
            reader.multiply<NT, true, kStarts>(unpacker, slot, bytes, x, bias, sums);
            if (any_overflow<NT>(sums)) reader.multiply<NT, false, kStarts>(unpacker, slot, bytes, x, bias, sums);
            handoff.wait_until_added();
            partials.store(reader.slice, sums);
            handoff.report_stored(number % turns_of(NT));
        }
    }
    template <int NT>
    __device__ __forceinline__ void stage(const ExpertTiles& tiles, const ExpertTile& tile) const {
        stage_activations<NT, kNarrow<MAX_NT>>(p, tiles, tile, shared.template x<NT>(units));
    }
    __device__ __forceinline__ void enter_tile(const ExpertTiles& tiles, const ExpertTile& tile) const {
        __syncthreads();  // the preceding tile is finished
        if (tile.count <= 8) stage<1>(tiles, tile);
        else if (tile.count <= 16) stage<2>(tiles, tile);
        else if (MAX_NT > 2 && tile.count <= 24) stage<MAX_NT == 2 ? 2 : 3>(tiles, tile);
        else if (MAX_NT > 2) stage<MAX_NT>(tiles, tile);
        __syncthreads();
    }
    __device__ __forceinline__ void run(const ExpertTiles& tiles, ChunkWalk walk, int stages) {
        int staged = -1;
#pragma unroll 1
        for (int number = 0; walk.valid(); ++number, walk.advance()) {
            const int count = walk.tile.count;
            if (staged != walk.at) enter_tile(tiles, walk.tile);
            staged = walk.at;
            if (count <= 8) multiply_chunk<1>(stages, number);
            else if (count <= 16) multiply_chunk<2>(stages, number);
            else if (MAX_NT > 2 && count <= 24) multiply_chunk<MAX_NT == 2 ? 2 : 3>(stages, number);
            else if (MAX_NT > 2) multiply_chunk<MAX_NT>(stages, number);
        }
    }
};

// A finisher adds and writes the sums of one group of pairs of its chunks.
template <int MAX_NT, bool GATED>
struct Finisher {
    static_assert(MAX_NT <= kFinishers && kStages<GATED> % 2 == 0, "");
    const PairProduct& p;
    MmaShared<MAX_NT>& shared;
    const int finisher, units;
    const Handoff<MAX_NT> handoff;
    StageCopies<kSlots<MAX_NT>, GATED> copies;
    LanePairs pairs;

    __device__ __forceinline__ Finisher(const PairProduct& p, const ChunkWalk& walk, MmaShared<MAX_NT>& shared, int finisher)
        : p(p), shared(shared), finisher(finisher), units(p.cols / 32), handoff(shared),
          copies(walk, shared.ring(), shared.full) {}

    __device__ __forceinline__ void begin() {
        if (finisher == 0 && threadIdx.x % 32 == 0) handoff.init();
        __syncwarp();
        copies.next(p, units, kSlots<MAX_NT>, __CUDA_ARCH__ < 900 || finisher == 0);
        if (finisher == 0) shared.bias.store();
    }
    // Chunk `number` of the block.
    __device__ __forceinline__ void finish_chunk(const ExpertTile& tile, int chunk, int number) {
        const int groups = (tile.count + 7) / 8, group = finisher % finishers_of(groups), turn = number % turns_of(groups);
        const bool own = group < groups && finisher / finishers_of(groups) == turn;
#if __CUDA_ARCH__ >= 900
        if (!own) return copies.next(p, units, kStages<GATED>, false);
#endif
        const Partials partials{shared.partials, groups};
        const int arrivals = groups == 3 ? 1 + (group == 0) : kFinishers / groups;
        LaneTotals<GATED> totals;
        totals.load_biases(p, tile.expert, chunk);
#pragma unroll
        for (int stage = 0; stage < kStages<GATED>; ++stage) {
            handoff.wait_until_stored(turn, stage);
            copies.next(p, units, __CUDA_ARCH__ < 900 || group == 0);
            if (own) partials.total(group, totals.sums[stage]);
            handoff.report_added(arrivals);
        }
        if (own) totals.write(p, chunk, pairs);
    }
    __device__ __forceinline__ void enter_tile(const ExpertTiles& tiles, const ExpertTile& tile) {
        __syncthreads();
        find_pairs<GATED>(p, tiles, tile, shared.pairs);
        __syncthreads();
        pairs.load(shared.pairs, finisher % finishers_of((tile.count + 7) / 8), tile.count);
    }
    __device__ __forceinline__ void run(const ExpertTiles& tiles, ChunkWalk walk) {
        int staged = -1;
#pragma unroll 1
        for (int number = 0; walk.valid(); ++number, walk.advance()) {
            if (staged != walk.at) enter_tile(tiles, walk.tile);
            staged = walk.at;
            finish_chunk(walk.tile, walk.chunk, number);
        }
    }
};

template <int MAX_NT, bool GATED>
__global__ void __launch_bounds__(kMmaThreads, 1)
    experts_mma(const __grid_constant__ PairProduct p, const ExpertTiles tiles) {
    extern __shared__ __align__(16) u8 dynamic[];
    MmaShared<MAX_NT>& shared = *reinterpret_cast<MmaShared<MAX_NT>*>(dynamic);
    const int warp = uniform_warp();
    // As in grouped_experts.cu: the dependent reads the tiles before its own wait.
    if (GATED) grid_dependency_wait();
    const ChunkWalk walk(tiles, p.rows / kChunk);
    if (warp >= kSlices) {
        Finisher<MAX_NT, GATED> finisher(p, walk, shared, warp - kSlices);
        finisher.begin();
        if (!GATED) grid_dependency_wait();
        finisher.run(tiles, walk);
    } else {
        if (!GATED) grid_dependency_wait();
        Multiplier<MAX_NT>(p, shared, warp).run(tiles, walk, kStages<GATED>);
    }
}
