// What this library was built as and for (KVP_BUILT_* are defined by CMakeLists.txt).
#include "kvp_edge.h"

#include "llama.h"

extern "C" {

int32_t      kvp_abi_version(void) { return KVP_ABI_VERSION; }
const char * kvp_built_for(void) { return KVP_BUILT_FOR; }
const char * kvp_built_llama_version(void) { return KVP_BUILT_LLAMA_VERSION; }
const char * kvp_loaded_llama_version(void) { return llama_version(); }

} // extern "C"
