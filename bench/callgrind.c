/* Client requests to callgrind, callable through ctypes; the header comes with torch. */
#include <callgrind.h>

void count_from_here(void) {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}

void count_until_here(const char* name) {
  CALLGRIND_DUMP_STATS_AT(name);
  CALLGRIND_STOP_INSTRUMENTATION;
}
