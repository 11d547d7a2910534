// The fibers' scheduler: whose turn it is, and who waits for whom. A library of its own, shared by all kernels'.
//
// A fiber begins on a stack of its own by setcontext and lives on from block to block and launch to launch: longjmp goes
// to and fro, which makes no system call. Order is first come, first served, or with `backwards` the last come first and the last block first: what depends on
// neither is likely to be free of races. Shared memory that is asked for at launch begins as NaNs.
#include "fibers.h"

#include <csetjmp>
#include <cstdlib>
#include <deque>
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
    std::vector<char> stack = std::vector<char>(kStack);
};

struct Warp {
    int live = 0;
    std::vector<Fiber*> waiting;
    Post posts[2][kWarp];
};

Thread* current;
Shape block_index, block_size, grid_size;
alignas(256) char dynamic_shared[kShared];

static bool backwards;
static std::vector<Warp> warps;
static std::deque<Fiber*> ready;
static std::vector<Fiber*> at_block, at_named;
static int live;
static jmp_buf scheduler;
static void (*body)(void*);
static void* arguments;

static Fiber* fiber() { return static_cast<Fiber*>(current); }
static Warp& warp() { return warps[current->number / kWarp]; }

Post* posts_of_warp(unsigned exchange) { return warp().posts[exchange % 2]; }

static void wait() {
    if (!_setjmp(fiber()->at)) _longjmp(scheduler, 1);
}

static void go_on_if_complete(std::vector<Fiber*>& waiting, int expected) {
    if (waiting.empty() || (int)waiting.size() < expected) return;
    ready.insert(ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
}

void block_barrier() {
    at_block.push_back(fiber());
    go_on_if_complete(at_block, live);
    wait();
}

void named_barrier(int threads) {
    at_named.push_back(fiber());
    go_on_if_complete(at_named, threads);
    wait();
}

void yield() {
    backwards ? ready.push_front(fiber()) : ready.push_back(fiber());
    wait();
}

void warp_barrier() {
    warp().waiting.push_back(fiber());
    go_on_if_complete(warp().waiting, warp().live);
    wait();
}

static void life() {
    for (;;) {
        body(arguments);
        --live, --warp().live;
        go_on_if_complete(at_block, live);
        go_on_if_complete(warp().waiting, warp().live);
        wait();  // for its next block
    }
}

static void begin(Fiber& fiber) {
    fiber.begun = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, life, 0);
    setcontext(&fiber.context);
}

static void resume(Fiber& next) {
    current = &next;
    if (_setjmp(scheduler)) return;
    if (next.begun) _longjmp(next.at, 1);
    begin(next);
}

static void run_block(std::deque<Fiber>& fibers, unsigned count, size_t shared) {
    std::memset(dynamic_shared, 0xff, shared);
    warps.assign((count + kWarp - 1) / kWarp, Warp{});
    live = count;
    for (unsigned i = 0; i < count; ++i) {
        fibers[i].number = i, fibers[i].exchanges = 0;
        fibers[i].index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
        ++warps[i / kWarp].live;
        ready.push_back(&fibers[i]);
    }
    while (!ready.empty()) {
        Fiber* next = backwards ? ready.back() : ready.front();
        backwards ? ready.pop_back() : ready.pop_front();
        resume(*next);
    }
}

int run(Shape grid, Shape block, size_t shared, void (*kernel)(void*), void* kernel_arguments) {
    const unsigned rounding = _mm_getcsr();
    _mm_setcsr(rounding | kFlushToZero | kDenormalsAreZero);  // as -ftz=true, but of doubles too
    body = kernel, arguments = kernel_arguments, block_size = block, grid_size = grid;
    static std::deque<Fiber> fibers;
    const unsigned threads = block.x * block.y * block.z, blocks = grid.x * grid.y * grid.z;
    while (fibers.size() < threads) fibers.emplace_back();
    live = 0;
    for (unsigned i = 0; i < blocks && !live; ++i) {
        const unsigned b = backwards ? blocks - 1 - i : i;
        block_index = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
        run_block(fibers, threads, shared);
    }
    _mm_setcsr(rounding);
    if (live) fibers.clear(), at_block.clear(), at_named.clear();  // they stand half-way
    return live;
}
}  // namespace emu

extern "C" void run_backwards(int yes) { emu::backwards = yes; }
