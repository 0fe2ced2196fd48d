/* LD_PRELOAD: a disk that fails or forgets, and a clock that jumps. Compiled and driven by tests/shim.py, which says how.

   What a process syncs below SHIM_ROOT is copied to SHIM_JOURNAL, one numbered file a sync, before the sync returns:
   "file INODE\n" and the bytes, or "folder PATH\n" and its entries, "TYPE INODE NAME\n" each. What is in no such file a power cut takes. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* SHIM_ORDERS, shared with the test: its struct format is "=qqii232s". */
static struct orders { int64_t syncs, clock_s; int32_t error, calls; char part[232]; } *orders;
enum { ON_OPEN = 1, ON_WRITE = 2, ON_SYNC = 4 };
static const char *root, *journal;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("SHIM_ORDERS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    root = getenv("SHIM_ROOT");
    journal = getenv("SHIM_JOURNAL");
    void *at = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *orders, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0) syscall(SYS_close, fd);
    orders = at == MAP_FAILED ? NULL : at;
}

static int is_below(const char *path) {
    size_t n = root ? strlen(root) : 0;
    return orders && n && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    return n > 0 && is_below(path);
}

/* Whether this call is to fail; then errno says how. */
static int fails(const char *path, int call) {
    if (!(orders->calls & call) || !strstr(path, orders->part)) return 0;
    errno = orders->error;
    return 1;
}

static int fd_fails(int fd, int call) {
    char path[PATH_MAX];
    return orders && (orders->calls & call) && path_of(fd, path) && fails(path, call);
}

static void keep(int fd, const char *path) {
    char name[PATH_MAX], buffer[65536];
    struct stat found;
    snprintf(name, sizeof name, "%s/lock", journal);
    int lock = syscall(SYS_openat, AT_FDCWD, name, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (lock < 0 || flock(lock, LOCK_EX) || fstat(fd, &found)) abort();
    snprintf(name, sizeof name, "%s/%08ld", journal, (long)orders->syncs + 1);
    int out = syscall(SYS_openat, AT_FDCWD, name, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    if (out < 0) abort();
    if (S_ISDIR(found.st_mode)) {
        dprintf(out, "folder %s\n", path);
        DIR *folder = opendir(path);
        for (struct dirent *one; folder && (one = readdir(folder));)
            if (strcmp(one->d_name, ".") && strcmp(one->d_name, ".."))
                dprintf(out, "%c %lu %s\n", one->d_type == DT_DIR ? 'd' : 'f', (unsigned long)one->d_ino, one->d_name);
        if (folder) closedir(folder);
    } else {
        dprintf(out, "file %lu\n", (unsigned long)found.st_ino);
        snprintf(name, sizeof name, "/proc/self/fd/%d", fd);  /* the descriptor may be open for writing alone */
        int in = syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC);
        if (in < 0) abort();
        for (ssize_t n; (n = read(in, buffer, sizeof buffer)) > 0;)
            if (syscall(SYS_write, out, buffer, n) != n) abort();
        syscall(SYS_close, in);
    }
    syscall(SYS_close, out);
    orders->syncs++;
    syscall(SYS_close, lock);
}

static int sync_of(int fd, long number) {
    char path[PATH_MAX];
    if (fd_fails(fd, ON_SYNC)) return -1;
    if (!journal || !orders || !path_of(fd, path)) return syscall(number, fd);
    keep(fd, path);
    return 0;
}

int fsync(int fd) { return sync_of(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_of(fd, SYS_fdatasync); }

ssize_t write(int fd, const void *data, size_t size) { return fd_fails(fd, ON_WRITE) ? -1 : syscall(SYS_write, fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return fd_fails(fd, ON_WRITE) ? -1 : syscall(SYS_pwrite64, fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) { return pwrite(fd, data, size, at); }

static int open_of(const char *path, int flags, mode_t mode) {
    int writes = (flags & O_ACCMODE) != O_RDONLY;
    if (writes && orders && (orders->calls & ON_OPEN) && is_below(path) && fails(path, ON_OPEN)) return -1;
    return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

#define MODE(last) mode_t mode = 0; va_list more; va_start(more, last); if (last & (O_CREAT | O_TMPFILE)) mode = va_arg(more, mode_t); va_end(more);
int open(const char *path, int flags, ...) { MODE(flags) return open_of(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return open_of(path, flags, mode); }

static int64_t jumped(void) { return orders ? orders->clock_s : 0; }

int clock_gettime(clockid_t which, struct timespec *at) {
    int result = syscall(SYS_clock_gettime, which, at);
    if (!result && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) at->tv_sec += jumped();
    return result;
}
int gettimeofday(struct timeval *at, void *zone) {
    int result = syscall(SYS_gettimeofday, at, zone);
    if (!result) at->tv_sec += jumped();
    return result;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
