# Target `torch_stable`: torch's stable-ABI headers and the libraries that hold its C shims.
# find_package(Torch) would drag in the whole CUDA toolkit and ATen; neither is wanted here.
execute_process(
  COMMAND "${MOE_EXT_PYTHON}" -c "import torch; print(torch.__version__, end='')"
  OUTPUT_VARIABLE MOE_EXT_TORCH_VERSION COMMAND_ERROR_IS_FATAL ANY)
execute_process(
  COMMAND "${MOE_EXT_PYTHON}" -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent, end='')"
  OUTPUT_VARIABLE TORCH_DIR COMMAND_ERROR_IS_FATAL ANY)
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${TORCH_DIR}/include")
target_link_directories(torch_stable INTERFACE "${TORCH_DIR}/lib")
target_link_libraries(torch_stable INTERFACE torch_cpu)
# One build serves torch 2.11 and later: only what 2.11 already had is visible.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
