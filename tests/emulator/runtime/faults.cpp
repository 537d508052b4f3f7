// Faults: messages with file and line, and signals turned into faults.
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <ucontext.h>

#include "runtime.h"

namespace emulator {

std::string fault_text;
bool in_kernel;
uintptr_t module_base;

static constexpr Place FROM_SITE = 0x80000000u;
static std::vector<Site> sites;
static std::map<std::pair<const char*, int>, Place> site_places;

Place place_of(Site site) {
  // Of the places asked for last.
  static struct {
    Site site;
    Place place;
  } known[256];
  auto& last = known[((uintptr_t)site.file / 8 + site.line) % 256];
  if (last.site.file == site.file && last.site.line == site.line) return last.place;
  auto [entry, is_new] = site_places.try_emplace({site.file, site.line}, FROM_SITE | (Place)sites.size());
  if (is_new) sites.push_back(site);
  last = {site, entry->second};
  return entry->second;
}

Place place_of(void* pc) { return (Place)((uintptr_t)pc - module_base); }

static std::string file_name(std::string path) { return path.substr(path.rfind('/') + 1); }

std::string describe(Place place) {
  if (place & FROM_SITE) {
    const Site& site = sites[place & ~FROM_SITE];
    return file_name(site.file) + ":" + std::to_string(site.line);
  }
  Dl_info module;
  if (!dladdr((void*)(module_base + 64), &module)) return "?";
  std::string command = format("addr2line -e '%s' 0x%x 2>/dev/null", module.dli_fname, place - 1), line;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char buffer[512];
    if (fgets(buffer, sizeof buffer, pipe)) line = buffer;
    pclose(pipe);
  }
  return file_name(line.substr(0, line.find_first_of(" \n")));
}

std::string format(const char* text, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

void fault(const char* kind, Place place, const std::string& text) {
  fault_text = std::string(kind) + ": " + text;
  if (place) fault_text += " at " + describe(place);
  if (running) fault_text += " by " + who(running);
  leave_launch();
}

void fault(const char* kind, Site site, const char* text, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  fault(kind, place_of(site), buffer);
}

// ---- signals: the undefined-behaviour sanitizer traps with SIGILL, guard pages with SIGSEGV --------

alignas(64) static uint8_t signal_stack[1 << 16], rescue_stack[1 << 16];
static struct {
  const char* kind;
  uintptr_t address, pc;
} caught;

static void report_signal() {
  uintptr_t address = caught.address, guard = (uintptr_t)running->stack;
  std::string text = format("access to address %p", (void*)address);
  if (!strcmp(caught.kind, "undefined-behaviour")) text = "array index, shift, overflow or alignment";
  if (!strcmp(caught.kind, "segfault")) {
    bool overflow = address >= guard - 4096 && address < guard + 64;
    text += overflow ? ", stack overflow" : ", " + locate(address);
  }
  fault(caught.kind, place_of((void*)(caught.pc + 1)), text);
}

static void on_signal(int number, siginfo_t* info, void* context) {
  if (!in_kernel) {
    signal(number, SIG_DFL);
    return;
  }
  auto* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  caught.kind = number == SIGFPE ? "arithmetic" : number == SIGILL ? "undefined-behaviour" : "segfault";
  caught.address = (uintptr_t)info->si_addr;
  caught.pc = (uintptr_t)registers[REG_RIP];
  // Return from the handler into report_signal on a stack that is certainly whole.
  registers[REG_RIP] = (greg_t)report_signal;
  registers[REG_RSP] = (greg_t)(rescue_stack + sizeof rescue_stack - 72);
}

void install_signal_handlers() {
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int number : {SIGFPE, SIGILL, SIGSEGV, SIGBUS}) sigaction(number, &action, nullptr);
}
}  // namespace emulator
