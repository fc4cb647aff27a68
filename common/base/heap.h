// How much memory a process keeps that it no longer uses.
#pragma once

namespace tandem {

// glibc gives threads heaps of their own, up to eight for each processor, and every one keeps what
// its busiest moment took: a server whose threads come and go with its peers grows for hours by a
// megabyte a heap, on a large host to a gigabyte. After this there are few heaps; small pieces come
// from each thread's cache all the same. MALLOC_ARENA_MAX in the environment says otherwise. Call
// before any thread is started.
void KeepFewHeaps();

}  // namespace tandem
