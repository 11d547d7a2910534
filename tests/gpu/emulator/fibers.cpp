// The fibers' scheduler: whose turn it is, and who waits for whom. A library of its own, shared by all kernels'.
//
// A fiber begins on a stack of its own by setcontext and lives on from block to block and launch to launch: longjmp goes
// to and fro, which makes no system call. Order is first come, first served, or with `backwards` the last come first and the last block first: what depends on
// neither is likely to be free of races. Shared memory that is asked for at launch begins as NaNs.
#include "fibers.h"

#include <csetjmp>
#include <cstdlib>
#include <deque>
#include <memory>
#include <ucontext.h>
#include <vector>
#include <xmmintrin.h>

namespace emu {
constexpr size_t kStack = 128 << 10;
constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;

struct Fiber : Thread {
    ucontext_t context;
    jmp_buf at;
    bool begun = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
};

struct Warp {
    int live = 0;
    std::vector<Fiber*> waiting;
    Post posts[2][kWarp];
};

Thread* current;
Shape block_index, block_size, grid_size;
alignas(256) char dynamic_shared[kShared];

struct Block {
    Shape index;
    int live;
    std::vector<Warp> warps;
    std::deque<Fiber*> ready;
    std::vector<Fiber*> waiting, named[16], polling;
    std::vector<char> shared;  // while another block runs: static, then dynamic
};

static bool backwards;
static Block* block;  // that runs
static jmp_buf scheduler;
static Kernel kernel;

static Fiber* fiber() { return static_cast<Fiber*>(current); }
static Warp& warp() { return block->warps[current->number / kWarp]; }

Post* posts_of_warp(unsigned exchange) { return warp().posts[exchange % 2]; }

static void wait() {
    if (!_setjmp(fiber()->at)) _longjmp(scheduler, 1);
}

static void go_on_if_complete(std::vector<Fiber*>& waiting, int expected) {
    if (waiting.empty() || (int)waiting.size() < expected) return;
    block->ready.insert(block->ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
}

void block_barrier() {
    block->waiting.push_back(fiber());
    go_on_if_complete(block->waiting, block->live);
    wait();
}

void named_barrier(int barrier, int threads) {
    block->named[barrier].push_back(fiber());
    go_on_if_complete(block->named[barrier], threads);
    wait();
}

void yield() {
    backwards ? block->ready.push_front(fiber()) : block->ready.push_back(fiber());
    wait();
}

void warp_barrier() {
    warp().waiting.push_back(fiber());
    go_on_if_complete(warp().waiting, warp().live);
    wait();
}

void poll() {
    block->polling.push_back(fiber());
    wait();
}

static void life() {
    for (;;) {
        kernel.thread(kernel.arguments);
        --block->live, --warp().live;
        go_on_if_complete(block->waiting, block->live);
        go_on_if_complete(warp().waiting, warp().live);
        wait();  // for its next block
    }
}

static void begin(Fiber& fiber) {
    fiber.begun = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, life, 0);
    setcontext(&fiber.context);
}

static void resume(Fiber& next) {
    current = &next;
    if (_setjmp(scheduler)) return;
    if (next.begun) _longjmp(next.at, 1);
    begin(next);
}

static void begin_block(Block& next, Fiber* const* fibers, unsigned count, size_t shared) {
    const size_t statics = kernel.statics_end - kernel.statics_begin;
    next.live = count, next.warps.resize((count + kWarp - 1) / kWarp);
    next.shared.assign(statics + shared, (char)0xff);
    std::memcpy(next.shared.data(), kernel.statics_begin, statics);
    for (unsigned i = 0; i < count; ++i) {
        fibers[i]->number = i, fibers[i]->exchanges = 0;
        fibers[i]->index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
        ++next.warps[i / kWarp].live;
        next.ready.push_back(fibers[i]);
    }
}

// Runs a block until all its threads have ended, wait or poll. Returns whether any did more than poll again.
static bool run_block(Block& next, size_t shared) {
    const size_t statics = kernel.statics_end - kernel.statics_begin;
    block = &next, block_index = next.index;
    std::memcpy(kernel.statics_begin, next.shared.data(), statics);
    std::memcpy(dynamic_shared, next.shared.data() + statics, shared);
    const size_t polled = next.polling.size();
    next.ready.insert(next.ready.end(), next.polling.begin(), next.polling.end());
    next.polling.clear();
    size_t resumed = 0;
    for (; !next.ready.empty(); ++resumed) {
        Fiber* fiber = backwards ? next.ready.back() : next.ready.front();
        backwards ? next.ready.pop_back() : next.ready.pop_front();
        resume(*fiber);
    }
    std::memcpy(next.shared.data(), kernel.statics_begin, statics);
    std::memcpy(next.shared.data() + statics, dynamic_shared, shared);
    return resumed > polled || next.polling.size() < polled;
}

// Runs blocks [first, end) of the grid together. Returns the number of threads that are left.
static int run_blocks(std::deque<Fiber>& fibers, unsigned first, unsigned end, unsigned threads, size_t shared) {
    std::vector<Block> blocks(end - first);
    while (fibers.size() < blocks.size() * threads) fibers.emplace_back();
    std::vector<Fiber*> all;
    for (Fiber& fiber : fibers) all.push_back(&fiber);
    for (unsigned i = 0; i < blocks.size(); ++i) {
        const unsigned b = first + (backwards ? blocks.size() - 1 - i : i);
        blocks[i].index = {b % grid_size.x, b / grid_size.x % grid_size.y, b / (grid_size.x * grid_size.y)};
        begin_block(blocks[i], &all[i * threads], threads, shared);
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (Block& each : blocks)
            if (each.live) moved |= run_block(each, shared);
    }
    int live = 0;
    for (const Block& each : blocks) live += each.live;
    return live;
}

int run(Shape grid, Shape block, size_t shared, const Kernel& launched) {
    const unsigned rounding = _mm_getcsr();
    _mm_setcsr(rounding | kFlushToZero | kDenormalsAreZero);  // as -ftz=true, but of doubles too
    kernel = launched, block_size = block, grid_size = grid;
    static std::deque<Fiber> fibers;
    const unsigned threads = block.x * block.y * block.z, blocks = grid.x * grid.y * grid.z;
    const unsigned at_once = kernel.together ? blocks : 1;
    int live = 0;
    for (unsigned i = 0; i < blocks && !live; i += at_once) {
        const unsigned first = backwards ? blocks - i - at_once : i;
        live = run_blocks(fibers, first, first + at_once, threads, shared);
    }
    _mm_setcsr(rounding);
    if (live) fibers.clear();  // they stand half-way
    return live;
}
}  // namespace emu

extern "C" void run_backwards(int yes) { emu::backwards = yes; }
