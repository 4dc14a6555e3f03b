/* Makes system calls of a real command fail: a library for LD_PRELOAD, used by faults.py.

   Only calls on files below the folders of FAULTS_ROOTS are counted, over all processes together: the counters
   lie in the file FAULTS_STATE, which every process maps. The call of the chosen number fails, or ends its
   process. What would reach the network is refused, counted and logged. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, FSYNC = 2, RENAME = 4, MKDIR = 8, OPEN = 16, REMOVE = 32, READ = 64 };

struct state {         /* the same order as in faults.py */
    int64_t kinds;     /* which calls are counted: a sum of the numbers above */
    int64_t target;    /* the number of the call that fails; 0 for none */
    int64_t error;     /* errno; below 0: the number of the signal that ends the process */
    int64_t lasting;   /* whether all later calls of these kinds fail as well */
    int64_t count;     /* counted calls */
    int64_t fired;     /* failed calls */
    int64_t network;   /* refused attempts to reach the network */
};

static struct state *state;
static char roots[8][PATH_MAX];
static int root_count;

__attribute__((constructor)) static void set_up(void) {
    const char *file = getenv("FAULTS_STATE");
    const char *given = getenv("FAULTS_ROOTS");
    if (!file) return;
    int fd = syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return;
    void *memory = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (memory == MAP_FAILED) return;
    state = memory;
    while (given && *given && root_count < 8) {
        size_t length = strcspn(given, ":");
        snprintf(roots[root_count++], PATH_MAX, "%.*s", (int)length, given);
        given += length + (given[length] == ':');
    }
}

static void log_line(const char *what, const char *path) {
    const char *file = getenv("FAULTS_LOG");
    char line[PATH_MAX + 64];
    if (!file) return;
    int length = snprintf(line, sizeof line, "%s %s\n", what, path ? path : "");
    int fd = syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0) return;
    syscall(SYS_write, fd, line, (size_t)length);
    syscall(SYS_close, fd);
}

static int below_roots(const char *path) {
    for (int i = 0; i < root_count; i++) {
        size_t length = strlen(roots[i]);
        if (!strncmp(path, roots[i], length) && (path[length] == '/' || !path[length])) return 1;
    }
    return 0;
}

/* Whether this call is to fail; errno is set then. */
static int fails(int kind, const char *name, const char *path) {
    if (!state || !(state->kinds & kind) || !below_roots(path)) return 0;
    int64_t number = __atomic_add_fetch(&state->count, 1, __ATOMIC_SEQ_CST);
    log_line(name, path);
    if (!state->target || number < state->target) return 0;
    if (number > state->target && !state->lasting) return 0;
    __atomic_add_fetch(&state->fired, 1, __ATOMIC_SEQ_CST);
    if (state->error < 0) {
        syscall(SYS_kill, getpid(), (int)-state->error);
        for (;;) pause();
    }
    errno = (int)state->error;
    return 1;
}

static int path_fails(int kind, const char *name, int folder, const char *path) {
    char whole[2 * PATH_MAX], base[PATH_MAX], link[64];
    if (!state || !path) return 0;
    if (path[0] == '/') return fails(kind, name, path);
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return 0;
        base[length] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return fails(kind, name, whole);
}

static int fd_fails(int kind, const char *name, int fd) {
    char path[PATH_MAX], link[64];
    if (!state || !(state->kinds & kind)) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return fails(kind, name, path);
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

#define MODE(last)                                       \
    mode_t mode = 0;                                     \
    if (flags & (O_CREAT | O_TMPFILE)) {                 \
        va_list rest;                                    \
        va_start(rest, last);                            \
        mode = va_arg(rest, mode_t);                     \
        va_end(rest);                                    \
    }

int open(const char *path, int flags, ...) {
    MODE(flags)
    return path_fails(OPEN, "open", AT_FDCWD, path) ? -1 : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    return path_fails(OPEN, "open", AT_FDCWD, path) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    MODE(flags)
    return path_fails(OPEN, "open", folder, path) ? -1 : REAL(openat)(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags)
    return path_fails(OPEN, "open", folder, path) ? -1 : REAL(openat64)(folder, path, flags, mode);
}
FILE *fopen(const char *path, const char *how) {
    return path_fails(OPEN, "open", AT_FDCWD, path) ? NULL : REAL(fopen)(path, how);
}
FILE *fopen64(const char *path, const char *how) {
    return path_fails(OPEN, "open", AT_FDCWD, path) ? NULL : REAL(fopen64)(path, how);
}
ssize_t read(int fd, void *data, size_t size) {
    return fd_fails(READ, "read", fd) ? -1 : REAL(read)(fd, data, size);
}
ssize_t write(int fd, const void *data, size_t size) {
    return fd_fails(WRITE, "write", fd) ? -1 : REAL(write)(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    return fd_fails(WRITE, "write", fd) ? -1 : REAL(writev)(fd, parts, count);
}
int fsync(int fd) { return fd_fails(FSYNC, "fsync", fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return fd_fails(FSYNC, "fsync", fd) ? -1 : REAL(fdatasync)(fd); }
int rename(const char *from, const char *to) {
    return path_fails(RENAME, "rename", AT_FDCWD, to) ? -1 : REAL(rename)(from, to);
}
int renameat(int old, const char *from, int new, const char *to) {
    return path_fails(RENAME, "rename", new, to) ? -1 : REAL(renameat)(old, from, new, to);
}
int renameat2(int old, const char *from, int new, const char *to, unsigned flags) {
    return path_fails(RENAME, "rename", new, to) ? -1 : REAL(renameat2)(old, from, new, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    return path_fails(MKDIR, "mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    return path_fails(MKDIR, "mkdir", folder, path) ? -1 : REAL(mkdirat)(folder, path, mode);
}
int unlink(const char *path) {
    return path_fails(REMOVE, "remove", AT_FDCWD, path) ? -1 : REAL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    return path_fails(REMOVE, "remove", folder, path) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
    return path_fails(REMOVE, "remove", AT_FDCWD, path) ? -1 : REAL(rmdir)(path);
}

static int refused(const char *what, const char *where) {
    __atomic_add_fetch(&state->network, 1, __ATOMIC_SEQ_CST);
    log_line(what, where);
    errno = ENETUNREACH;
    return -1;
}

int socket(int family, int kind, int protocol) {
    int local = family == AF_UNIX;
    return state && !local ? refused("network socket", "") : REAL(socket)(family, kind, protocol);
}
int getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    if (!state) return REAL(getaddrinfo)(host, service, hints, found);
    refused("network lookup", host);
    return EAI_FAIL;
}
