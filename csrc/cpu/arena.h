// Scratch memory for one task: one layout function both counts the bytes and hands the memory out.
#pragma once
#include <type_traits>

#include "vec.h"

namespace ringattn::RINGATTN_ISA {

// Hands out buffers one after another, each aligned to a cache line. Without memory an arena only counts: take()
// returns null, and `used` is the number of bytes that the same calls take from memory.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <class T = float>
  T* take(int64_t count) {
    static_assert(std::is_trivial_v<T>);  // the memory is not initialised
    T* buffer = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * (int64_t)sizeof(T), 64);
    return buffer;
  }
};

// `Buffers` is a struct of pointers whose constructor (Arena&, args...) takes each of them from the arena.
template <class Buffers, class... Args>
Buffers allocate(void* memory, const Args&... args) {
  Arena arena{static_cast<char*>(memory)};
  return Buffers(arena, args...);
}

// The bytes of memory that allocate<Buffers>(memory, args...) needs.
template <class Buffers, class... Args>
int64_t scratch_bytes(const Args&... args) {
  Arena arena;
  Buffers(arena, args...);
  return arena.used;
}

}  // namespace ringattn::RINGATTN_ISA
