# Target `cutlass_headers`: the headers inside the PyPI package nvidia-cutlass.
execute_process(
  COMMAND "${MOE_EXT_PYTHON}" -c
          "import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec('cutlass_library').origin).parent / 'source', end='')"
  OUTPUT_VARIABLE CUTLASS_DIR COMMAND_ERROR_IS_FATAL ANY)
add_library(cutlass_headers INTERFACE)
target_include_directories(cutlass_headers SYSTEM INTERFACE "${CUTLASS_DIR}/include" "${CUTLASS_DIR}/tools/util/include")
