// The reader's comparison: threads that only pread records into slots.
// Part of scripts/bench_streaming raw.
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

struct loop {
  int fd;
  const int64_t *offsets;
  int64_t n_reads, n_bytes, batch;
  char *slots;
  int64_t n_slots;
  atomic_long next;
  atomic_int failed;
  pthread_barrier_t barrier;
};

static void read_one(struct loop *loop, int64_t i) {
  char *slot = loop->slots + i % loop->n_slots * loop->n_bytes;
  for (int64_t done = 0; done < loop->n_bytes;) {
    ssize_t n = pread(loop->fd, slot + done, loop->n_bytes - done,
                      loop->offsets[i] + done);
    if (n <= 0) {
      atomic_store(&loop->failed, 1);
      return;
    }
    done += n;
  }
}

// Takes reads until a batch is done, then waits until the other threads are done too.
static void *work(void *argument) {
  struct loop *loop = argument;
  for (int64_t end = loop->batch;; end += loop->batch) {
    if (end > loop->n_reads) end = loop->n_reads;
    for (int64_t i; (i = atomic_load(&loop->next)) < end;)
      if (atomic_compare_exchange_weak(&loop->next, &i, i + 1)) read_one(loop, i);
    if (end == loop->n_reads) return 0;
    pthread_barrier_wait(&loop->barrier);
  }
}

// Reads n_reads records of n_bytes, number i into slot i % n_slots. A read begins when
// all batches of `batch` reads before it have ended. Returns the seconds, or -1.
double pread_loop(int fd, const int64_t *offsets, int64_t n_reads, int64_t n_bytes,
                  int64_t batch, char *slots, int64_t n_slots, int n_threads) {
  struct loop loop = {fd, offsets, n_reads, n_bytes, batch, slots, n_slots};
  pthread_t threads[256];
  struct timespec start, end;
  if (n_threads < 1 || n_threads > 256) return -1;
  pthread_barrier_init(&loop.barrier, 0, n_threads);
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (int i = 0; i < n_threads; i++)
    if (pthread_create(&threads[i], 0, work, &loop)) return -1;
  for (int i = 0; i < n_threads; i++) pthread_join(threads[i], 0);
  clock_gettime(CLOCK_MONOTONIC, &end);
  pthread_barrier_destroy(&loop.barrier);
  if (atomic_load(&loop.failed)) return -1;
  return end.tv_sec - start.tv_sec + 1e-9 * (end.tv_nsec - start.tv_nsec);
}
