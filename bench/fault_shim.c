// fault_shim: fail chosen file operations under one folder. LD_PRELOAD it; bench/file_faults.py does.
//
// SHIM_PREFIX  only paths that begin with it count
// SHIM_OPS     operations that count, as ",write,rename,"
// SHIM_FROM, SHIM_TO  the first and the last operation that fails, counted from 1; none fails without them
// SHIM_ERRNO   the error that they fail with
// SHIM_LOG     a file that gets a line for each counted operation
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define LONGEST 4096
static long counted;

static long number(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}

static void record(const char *op, const char *path, long turn, int fails) {
  const char *log = getenv("SHIM_LOG");
  if (!log) return;
  int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
  ssize_t (*real_write)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
  int file = real_open(log, O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (file < 0) return;
  char line[LONGEST + 64];
  int length = snprintf(line, sizeof line, "%ld %s %s%s\n", turn, op, path, fails ? " FAILED" : "");
  real_write(file, line, length);
  close(file);
}

static int fails(const char *op, const char *path) {
  const char *prefix = getenv("SHIM_PREFIX"), *ops = getenv("SHIM_OPS");
  char word[32];
  if (!prefix || !ops || !path || strncmp(path, prefix, strlen(prefix))) return 0;
  snprintf(word, sizeof word, ",%s,", op);
  if (!strstr(ops, word)) return 0;
  long turn = __sync_add_and_fetch(&counted, 1);
  int hit = turn >= number("SHIM_FROM", 1L << 40) && turn <= number("SHIM_TO", 1L << 40);
  record(op, path, turn, hit);
  if (hit) errno = (int)number("SHIM_ERRNO", EIO);
  return hit;
}

static const char *path_of(int file, char *room) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, room, LONGEST / 2 - 1);
  if (length < 0) return NULL;
  room[length] = 0;
  return room;
}

static const char *absolute(int folder, const char *path, char *room) {
  char base[LONGEST / 2];
  if (!path || path[0] == '/') return path;
  if (folder == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of(folder, base)) return path;
  snprintf(room, LONGEST, "%s/%s", base, path);
  return room;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define BY_FILE(type, name, op, args, call, ...) \
  type name args { REAL(type, name, __VA_ARGS__); char room[LONGEST]; \
    return fails(op, path_of(file, room)) ? -1 : real call; }
BY_FILE(ssize_t, write, "write", (int file, const void *from, size_t size), (file, from, size), int, const void *, size_t)
BY_FILE(ssize_t, pwrite64, "write", (int file, const void *from, size_t size, off64_t at), (file, from, size, at), int, const void *, size_t, off64_t)
BY_FILE(ssize_t, read, "read", (int file, void *into, size_t size), (file, into, size), int, void *, size_t)
BY_FILE(ssize_t, pread64, "read", (int file, void *into, size_t size, off64_t at), (file, into, size, at), int, void *, size_t, off64_t)
BY_FILE(int, fsync, "fsync", (int file), (file), int)
BY_FILE(int, fdatasync, "fsync", (int file), (file), int)
BY_FILE(int, ftruncate64, "truncate", (int file, off64_t size), (file, size), int, off64_t)
BY_FILE(int, fchmod, "chmod", (int file, mode_t mode), (file, mode), int, mode_t)

#define BY_PATH(type, name, op, folder, args, call, ...) \
  type name args { REAL(type, name, __VA_ARGS__); char room[LONGEST]; \
    return fails(op, absolute(folder, path, room)) ? -1 : real call; }
BY_PATH(int, rename, "rename", AT_FDCWD, (const char *path, const char *to), (path, to), const char *, const char *)
BY_PATH(int, renameat, "rename", at, (int at, const char *path, int there, const char *to), (at, path, there, to), int, const char *, int, const char *)
BY_PATH(int, unlink, "unlink", AT_FDCWD, (const char *path), (path), const char *)
BY_PATH(int, unlinkat, "unlink", at, (int at, const char *path, int flags), (at, path, flags), int, const char *, int)
BY_PATH(int, rmdir, "unlink", AT_FDCWD, (const char *path), (path), const char *)
BY_PATH(int, mkdir, "mkdir", AT_FDCWD, (const char *path, mode_t mode), (path, mode), const char *, mode_t)
BY_PATH(int, mkdirat, "mkdir", at, (int at, const char *path, mode_t mode), (at, path, mode), int, const char *, mode_t)

#define OPENS (O_WRONLY | O_RDWR)
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
#define OPEN(name) int name(const char *path, int flags, ...) { \
  REAL(int, name, const char *, int, ...); MODE char room[LONGEST]; \
  return fails(flags & OPENS ? "create" : "open", absolute(AT_FDCWD, path, room)) ? -1 : real(path, flags, mode); }
#define OPEN_AT(name) int name(int at, const char *path, int flags, ...) { \
  REAL(int, name, int, const char *, int, ...); MODE char room[LONGEST]; \
  return fails(flags & OPENS ? "create" : "open", absolute(at, path, room)) ? -1 : real(at, path, flags, mode); }
OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)
