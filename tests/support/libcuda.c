// A libcuda.so.1 whose every function succeeds and does nothing, but keeps the last launch.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "cuda.h"

#define MOST 96
static struct {
  CUlaunchConfig config;
  CUlaunchAttribute attributes[4];
  CUfunction function;
  int count, sizes[MOST];
  unsigned char parameters[MOST][128];
  uint64_t launches;
} last;

// How many bytes each of the next launches' parameters has.
void stub_layout(int count, const int *sizes) {
  last.count = count;
  memcpy(last.sizes, sizes, count * sizeof(int));
}

uint64_t stub_launches(void) { return last.launches; }

static int put(unsigned char *out, int at, const void *from, int size) {
  memcpy(out + at, from, size);
  return at + size;
}

// All of the last launch, grid to parameters, as bytes.
int stub_read(unsigned char *out) {
  int at = put(out, 0, &last.config, 7 * sizeof(unsigned));  // grid, block, shared memory
  at = put(out, at, &last.config.hStream, sizeof(CUstream));
  at = put(out, at, &last.config.numAttrs, 4);
  at = put(out, at, &last.function, sizeof(CUfunction));
  for (unsigned i = 0; i < last.config.numAttrs; ++i) {
    at = put(out, at, &last.attributes[i].id, 4);
    at = put(out, at, &last.attributes[i].value, 4);
  }
  for (int i = 0; i < last.count; ++i) at = put(out, at, last.parameters[i], last.sizes[i]);
  return at;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **p, void **extra) {
  ++last.launches;
  last.config = *config;
  last.function = f;
  for (unsigned i = 0; i < config->numAttrs && i < 4; ++i) last.attributes[i] = config->attrs[i];
  for (int i = 0; i < last.count; ++i) memcpy(last.parameters[i], p[i], last.sizes[i]);
  return 0;
}

// A tensor map is here its arguments.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
    void *address, const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
    const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  uint64_t *word = (uint64_t *)map;
  memset(map, 0, sizeof *map);
  word[0] = (uint64_t)address;
  word[1] = type | (uint64_t)rank << 8 | (uint64_t)interleave << 16 | (uint64_t)swizzle << 24 |
            (uint64_t)promotion << 32 | (uint64_t)fill << 40;
  for (unsigned k = 0; k < rank && k < 3; ++k) {
    word[3 + k] = sizes[k];
    if (k + 1 < rank) word[6 + k] = strides[k];
    word[9 + k] = box[k] | (uint64_t)steps[k] << 32;
  }
  return 0;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    default: *value = 233472;
  }
  return 0;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}

// Every module is a kernel of its own.
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = malloc(8); return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = (CUfunction)m; return 0; }
CUresult cuModuleUnload(CUmodule m) { return 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "stub"; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
#undef cuDevicePrimaryCtxRetain
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice d) { *context = (CUcontext)1; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)value = p; return 0; }
CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **values, CUdeviceptr p) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction f, const CUlaunchConfig *config) { *count = 1; return 0; }
