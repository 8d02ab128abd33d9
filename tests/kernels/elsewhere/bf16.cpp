// The three instructions of AVX512_BF16 on a processor that has AVX-512 without them: it raises SIGILL at each, and the
// handler does what the instruction would have done. It is in place where this is linked or loaded; every other illegal
// instruction goes to the handler that was there before.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (the instructions, EVEX), and volume 1,
// chapter 13 (how registers lie in an XSAVE area, which the signal's frame has).
#include <cpuid.h>
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#pragma GCC target("avx512f,avx512bw")

namespace {

enum class Operation { dot, convert, convert_two };

struct Instruction {
  Operation operation;
  int bytes;  // that it takes
  int lanes;  // of 32 bits
  int target, first, second;
  const uint8_t* memory;  // instead of `second`
  bool broadcast, zeroing;
  int mask;  // 0: none
};

// Components of an XSAVE area.
enum Component { SSE = 1, AVX = 2, OPMASK = 5, ZMM_HIGH = 6, ZMM_MORE = 7, COMPONENTS = 8 };
struct Place {
  uint32_t offset, size;
} places[COMPONENTS];

struct sigaction before;
std::atomic<int64_t> count{0};

// The registers of whoever was interrupted: what is written here is in them when the handler returns.
class Registers {
 public:
  explicit Registers(const ucontext_t& context) : area_(reinterpret_cast<char*>(context.uc_mcontext.fpregs)) {}

  bool complete() const {
    constexpr uint64_t needed = 1 << SSE | 1 << AVX | 1 << OPMASK | 1 << ZMM_HIGH | 1 << ZMM_MORE;
    uint32_t magic;
    uint64_t saved;
    std::memcpy(&magic, area_ + 464, sizeof magic);
    std::memcpy(&saved, area_ + 472, sizeof saved);
    return magic == 0x46505853 && (saved & needed) == needed;
  }

  void read(int n, char (&to)[64]) const {
    if (n >= 16) return read(ZMM_MORE, n - 16, to, 64);
    read(SSE, n, to, 16);
    read(AVX, n, to + 16, 16);
    read(ZMM_HIGH, n, to + 32, 32);
  }

  void write(int n, const char (&from)[64]) {
    if (n >= 16) return write(ZMM_MORE, n - 16, from, 64);
    write(SSE, n, from, 16);
    write(AVX, n, from + 16, 16);
    write(ZMM_HIGH, n, from + 32, 32);
  }

  uint32_t mask(int n) const {
    uint64_t bits;
    read(OPMASK, n, reinterpret_cast<char*>(&bits), sizeof bits);
    return (uint32_t)bits;
  }

 private:
  // Which components the area holds. The others are as after a reset, zero, whatever the area has in their place.
  uint64_t& held() const { return *reinterpret_cast<uint64_t*>(area_ + 512); }

  void read(Component component, int n, char* to, size_t size) const {
    if (held() >> component & 1) {
      std::memcpy(to, area_ + places[component].offset + n * size, size);
    } else {
      std::memset(to, 0, size);
    }
  }

  void write(Component component, int n, const char* from, size_t size) {
    if (!(held() >> component & 1)) {
      std::memset(area_ + places[component].offset, 0, places[component].size);
      held() |= uint64_t{1} << component;
    }
    std::memcpy(area_ + places[component].offset + n * size, from, size);
  }

  char* area_;
};

// The address of an operand in memory whose bytes begin at `modrm`; `bytes` becomes how many there are. A displacement of
// one byte counts in units of `unit` bytes; one from rip counts from the end of the instruction, where these bytes end.
uint64_t address(const uint8_t* modrm, uint8_t prefix, const greg_t* registers, int unit, int& bytes) {
  constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const int mode = *modrm >> 6, low = *modrm & 7;
  const int high_base = prefix & 0x20 ? 0 : 8, high_index = prefix & 0x40 ? 0 : 8;
  const uint8_t* next = modrm + 1;
  int base = low;
  uint64_t at = 0;
  if (low == 4) {
    const int index = (*next >> 3 & 7) | high_index;
    if (index != 4) at = (uint64_t)registers[order[index]] << (*next >> 6);
    base = *next++ & 7;
  }
  const bool no_base = mode == 0 && base == 5;
  if (!no_base) at += registers[order[base | high_base]];
  if (mode == 1) {
    at += (int64_t)(int8_t)*next++ * unit;
  } else if (mode == 2 || no_base) {
    int32_t offset;
    std::memcpy(&offset, next, sizeof offset);
    next += sizeof offset;
    at += offset;
    if (no_base && low == 5) at += (uint64_t)next;
  }
  bytes = (int)(next - modrm);
  return at;
}

// Reads the instruction; false if it is none of the three, or no valid one.
bool decode(const uint8_t* at, const greg_t* registers, Instruction& to) {
  // EVEX of map 0F38, W = 0. R, X, B, R', vvvv and V' are stored inverted.
  if (at[0] != 0x62 || (at[1] & 0x0f) != 2 || (at[2] & 0x84) != 4) return false;
  const int prefix = at[2] & 3, opcode = at[4];
  if (opcode == 0x52 && prefix == 2) {
    to.operation = Operation::dot;
  } else if (opcode == 0x72 && prefix == 2) {
    to.operation = Operation::convert;
  } else if (opcode == 0x72 && prefix == 3) {
    to.operation = Operation::convert_two;
  } else {
    return false;
  }
  const int length = at[3] >> 5 & 3;
  to.lanes = 4 << length;
  to.zeroing = at[3] & 0x80, to.mask = at[3] & 7;
  to.target = (at[5] >> 3 & 7) | (at[1] & 0x80 ? 0 : 8) | (at[1] & 0x10 ? 0 : 16);
  to.first = (~at[2] >> 3 & 15) | (at[3] & 0x08 ? 0 : 16);
  to.broadcast = at[3] & 0x10;
  if (length == 3 || (to.zeroing && !to.mask) || (to.operation == Operation::convert && to.first != 0)) return false;
  if (at[5] >> 6 == 3) {
    to.second = (at[5] & 7) | (at[1] & 0x20 ? 0 : 8) | (at[1] & 0x40 ? 0 : 16);
    to.memory = nullptr;
    to.bytes = 6;
    return !to.broadcast;  // with registers it would be a rounding mode, which these do not have
  }
  int bytes;
  to.memory = reinterpret_cast<const uint8_t*>(address(at + 5, at[1], registers, to.broadcast ? 4 : 4 * to.lanes, bytes));
  to.bytes = 5 + bytes;
  return true;
}

// Rounds to the nearest, ties to even; what is too small for a normal number becomes zero, and each NaN quiet.
uint16_t rounded(uint32_t x) {
  const uint32_t size = x & 0x7fffffff;
  if (size < 0x00800000) return x >> 31 << 15;
  if (size > 0x7f800000) return x >> 16 | 0x40;
  return (x + 0x7fff + (x >> 16 & 1)) >> 16;
}

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

// a * b + sum for each pair, that of the high halves first, each rounded to the nearest; too small a number is zero,
// given or found, whatever MXCSR says. By way of memory: what is read after MXCSR was set is computed after.
__attribute__((noinline)) void dot(char* found, const char* sum, const char* first, const char* second) {
  const uint32_t control = 0x9fc0;
  asm volatile("ldmxcsr %0" : : "m"(control) : "memory");
  Floats x;
  Words a, b;
  std::memcpy(&x, sum, sizeof x);
  std::memcpy(&a, first, sizeof a);
  std::memcpy(&b, second, sizeof b);
  x = (Floats)_mm512_fmadd_ps((__m512)(a & 0xffff0000), (__m512)(b & 0xffff0000), (__m512)x);
  x = (Floats)_mm512_fmadd_ps((__m512)(a << 16), (__m512)(b << 16), (__m512)x);
  std::memcpy(found, &x, sizeof x);
}

void execute(const Instruction& it, Registers& registers) {
  const uint32_t mask = it.mask ? registers.mask(it.mask) : ~0u;
  alignas(64) char first[64], second[64], before[64], after[64] = {};
  registers.read(it.first, first);
  registers.read(it.target, before);
  if (!it.memory) {
    registers.read(it.second, second);
  } else if (it.broadcast) {
    int32_t word;
    std::memcpy(&word, it.memory, sizeof word);
    _mm512_store_si512(second, _mm512_set1_epi32(word));
  } else {
    // What is masked out need not be there to be read.
    const uint32_t read = it.operation == Operation::convert_two ? ~0u : mask;
    _mm512_store_si512(second, _mm512_maskz_loadu_epi32(read & ((1u << it.lanes) - 1), it.memory));
  }
  const int element = it.operation == Operation::dot ? 4 : 2;
  const int elements = it.operation == Operation::convert_two ? 2 * it.lanes : it.lanes;
  alignas(64) char found[64] = {};
  if (it.operation == Operation::dot) {
    dot(found, before, first, second);
  } else {
    for (int i = 0; i < elements; ++i) {
      uint32_t x;
      std::memcpy(&x, i < it.lanes ? second + 4 * i : first + 4 * (i - it.lanes), sizeof x);
      const uint16_t half = rounded(x);
      std::memcpy(found + 2 * i, &half, sizeof half);
    }
  }
  for (int i = 0; i < elements; ++i) {
    if (!(mask >> i & 1) && it.zeroing) continue;
    std::memcpy(after + i * element, (mask >> i & 1 ? found : before) + i * element, element);
  }
  registers.write(it.target, after);
}

void handle(int, siginfo_t*, void* frame) {
  ucontext_t& context = *static_cast<ucontext_t*>(frame);
  greg_t* general = context.uc_mcontext.gregs;
  Registers registers(context);
  Instruction it{};
  auto next = [&] { return decode(reinterpret_cast<const uint8_t*>(general[REG_RIP]), general, it); };
  if (!registers.complete() || !next()) {
    sigaction(SIGILL, &before, nullptr);  // which gets it, as the instruction is met again
    return;
  }
  do {  // those that follow at once need no signal of their own
    execute(it, registers);
    general[REG_RIP] += it.bytes;
    ++count;
  } while (next());
}

__attribute__((constructor)) void begin() {
  places[SSE] = {160, 256};
  for (const Component component : {AVX, OPMASK, ZMM_HIGH, ZMM_MORE}) {
    uint32_t size = 0, offset = 0, c, d;
    __cpuid_count(0xd, component, size, offset, c, d);
    places[component] = {offset, size};
  }
  struct sigaction now = {};
  now.sa_sigaction = handle;
  now.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &now, &before);
}

}  // namespace

// How many instructions were interpreted so far.
extern "C" __attribute__((visibility("default"))) int64_t interpreted() { return count; }
