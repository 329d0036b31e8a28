# ${made}.ptx -> ${made}.cubin, ptxas's words in ${made}.log, and ${made}.cpp, which makes the cubin part of a library.
execute_process(
  COMMAND ${nvcc} -cubin -arch=sm_90a -Xptxas -v,--warn-on-spills -o ${made}.cubin ${made}.ptx
  OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed)
file(WRITE ${made}.log "${said}")
if(failed)
  message(FATAL_ERROR "ptxas refuses ${made}.ptx:\n${said}")
endif()
string(REGEX MATCHALL "[^\n]*warning[^\n]*" warnings "${said}")
foreach(warning IN LISTS warnings)
  message(WARNING "${name}.cu: ${warning}")
endforeach()

file(STRINGS ${made}.ptx entries REGEX "^\\.visible \\.entry ")
list(TRANSFORM entries REPLACE "^\\.visible \\.entry ([A-Za-z0-9_]+).*" "\"\\1\"")
list(JOIN entries ", " kernels)
file(WRITE ${made}.cpp "// From ${name}.cu, by embed.cmake.
#include \"cuda/modules.h\"

__asm__(
    \".pushsection .rodata\\n.balign 64\\n\"
    \"moekern_cubin_${name}: .incbin \\\"${made}.cubin\\\"\\n\"
    \"moekern_cubin_end_${name}: .popsection\\n\");

extern \"C\" const unsigned char moekern_cubin_${name}[], moekern_cubin_end_${name}[];

namespace moekern::cuda {
namespace {
constexpr const char* kKernels[] = {${kernels}};
}
extern const Module k_module_${name};
const Module k_module_${name}{
    \"${name}\", moekern_cubin_${name}, moekern_cubin_end_${name}, {kKernels, sizeof kKernels / sizeof *kKernels}};
}  // namespace moekern::cuda
")
