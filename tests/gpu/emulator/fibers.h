// CUDA blocks on one CPU thread: each of their threads is a fiber, which runs until it meets a barrier.
//
// A barrier of the warp or the block hands the CPU to the next fiber; an exchange of a warp (shuffle, ballot, ldmatrix,
// mma) is: leave your operands, meet the warp, read the others'. Blocks run one after another, but for kernels whose
// blocks wait for each other: there a block whose threads all wait or poll hands the CPU to the next block, and shared
// memory is exchanged. A race shows only where the order of fibers decides it. A loop that waits for another thread of
// its block yields, and goes on for ever if that never comes. Next: cuda.h, ptx.h, fibers.cpp.
#pragma once
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

namespace emu {
constexpr int kWarp = 32;
constexpr size_t kShared = 227 << 10;

struct Shape {
    unsigned x, y, z;
};

struct Thread {
    Shape index;
    unsigned number, exchanges;
};

struct Post {  // what a lane leaves for its warp
    unsigned words[12];
};

extern Thread* current;
extern Shape block_index, block_size, grid_size;
alignas(256) extern char dynamic_shared[kShared];

void block_barrier();
void named_barrier(int barrier, int threads);
void yield();  // to all others that can run
void warp_barrier();
void poll();  // lets all others go on first
Post* posts_of_warp(unsigned exchange);

struct Kernel {
    void (*thread)(void*);
    void* arguments;
    bool together;                     // whether blocks wait for each other
    char *statics_begin, *statics_end;  // its static shared memory
};

// Runs a kernel for each thread of each block. 0, or how many threads wait for others that will never come.
int run(Shape grid, Shape block, size_t shared, const Kernel& kernel);

inline int lane() { return current->number % kWarp; }

// Leaves `mine` and gives the whole warp's.
template <class T>
const Post* exchange(const T& mine) {
    static_assert(sizeof(T) <= sizeof(Post), "a post is small");
    Post* posts = posts_of_warp(current->exchanges++);
    std::memcpy(&posts[lane()], &mine, sizeof mine);
    warp_barrier();
    return posts;
}

template <class T>
T from(const Post* posts, int lane) {
    T value;
    std::memcpy(&value, &posts[lane], sizeof value);
    return value;
}

template <class A>
std::remove_cv_t<std::remove_reference_t<A>> argument(const void* at) {  // which need not be aligned
    std::remove_cv_t<std::remove_reference_t<A>> value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(argument<A>(args[I])...);
}

// `shape` is grid and block, six numbers.
template <class... A>
int launch(void (*kernel)(A...), bool together, char* begin, char* end, const unsigned* shape, size_t shared, void** args) {
    auto thread = [=] { call(kernel, args, std::index_sequence_for<A...>{}); };
    auto body = [](void* thread_of) { (*static_cast<decltype(thread)*>(thread_of))(); };
    return run({shape[0], shape[1], shape[2]}, {shape[3], shape[4], shape[5]}, shared, {body, &thread, together, begin, end});
}

template <class... A>
int parameter_sizes(void (*)(A...), unsigned* sizes) {
    const unsigned all[] = {sizeof(A)..., 0};
    std::memcpy(sizes, all, sizeof...(A) * sizeof *sizes);
    return sizeof...(A);
}
}  // namespace emu

// What a library of one kernel exports. The linker knows where the section of its static shared memory is.
#define EMULATED_KERNEL(TOGETHER, ...)                                                                        \
    extern "C" {                                                                                              \
    extern char __start_shared_memory[] __attribute__((weak)), __stop_shared_memory[] __attribute__((weak));  \
    int run(const unsigned* shape, size_t shared, void** args) {                                              \
        return emu::launch(__VA_ARGS__, TOGETHER, __start_shared_memory, __stop_shared_memory, shape, shared, args); \
    }                                                                                                         \
    int parameter_sizes(unsigned* sizes) { return emu::parameter_sizes(__VA_ARGS__, sizes); }                 \
    }
