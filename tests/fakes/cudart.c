// The CUDA runtime's C functions over host memory, for the ctypes way of deploy/tensorrt/cuda.py. Streams run at once; graphs replay nothing,
// so capturing fails here, as on an engine that cannot be captured.
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <stdint.h>
#define OK 0
#define INVALID 1
typedef struct { double ms; } event_t;
int cudaRuntimeGetVersion(int *v) { *v = 12060; return OK; }
int cudaDriverGetVersion(int *v) { *v = 12040; return OK; }
int cudaGetDeviceCount(int *n) {
    const char *mode = getenv("FAKE_CUDA");
    *n = 1;
    return mode && !strcmp(mode, "no_device") ? 100 : OK;
}
int cudaSetDevice(int d) { return d == 0 ? OK : 101; }
int cudaDeviceGetAttribute(int *v, int attribute, int d) { *v = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 50 || attribute == 34 ? 0 : 1; return OK; }
int cudaMemGetInfo(size_t *f, size_t *t) { *f = (size_t)5 << 30; *t = (size_t)8 << 30; return OK; }
int cudaMalloc(void **p, size_t n) { *p = n > ((size_t)8 << 30) ? NULL : malloc(n); return *p ? OK : 2; }
int cudaFree(void *p) { free(p); return OK; }
int cudaHostAlloc(void **p, size_t n, unsigned flags) { return flags ? INVALID : cudaMalloc(p, n); }
int cudaFreeHost(void *p) { free(p); return OK; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) {
    if (kind != 1 && kind != 2) return INVALID;
    memcpy(to, from, n);
    return stream ? OK : INVALID;
}
int cudaStreamCreateWithFlags(void **s, unsigned flags) { *s = malloc(1); return flags == 1 ? OK : INVALID; }
int cudaStreamSynchronize(void *s) { return s ? OK : INVALID; }
int cudaStreamDestroy(void *s) { free(s); return OK; }
int cudaEventCreate(void **e) { *e = calloc(1, sizeof(event_t)); return OK; }
int cudaEventRecord(void *e, void *s) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    ((event_t *)e)->ms = t.tv_sec * 1e3 + t.tv_nsec / 1e6;
    return s ? OK : INVALID;
}
int cudaEventSynchronize(void *e) { return ((event_t *)e)->ms ? OK : 600; }
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = (float)(((event_t *)b)->ms - ((event_t *)a)->ms); return OK; }
int cudaEventDestroy(void *e) { free(e); return OK; }
int cudaStreamBeginCapture(void *s, int mode) { return s && mode == 2 ? OK : INVALID; }
int cudaStreamEndCapture(void *s, void **graph) { *graph = getenv("FAKE_GRAPHS") ? malloc(1) : NULL; return *graph ? OK : 900; }
int cudaGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) { *exec = malloc(1); return graph && !flags ? OK : INVALID; }
int cudaGraphDestroy(void *graph) { free(graph); return OK; }
int cudaGraphLaunch(void *exec, void *s) { return exec && s ? OK : INVALID; }
int cudaGraphExecDestroy(void *exec) { free(exec); return OK; }
int cudaGetLastError(void) { return OK; }
const char *cudaGetErrorString(int code) { return code == 2 ? "out of memory" : "some error"; }
