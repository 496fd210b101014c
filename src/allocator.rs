//! The system's allocator, with a per-thread cache of freed blocks for the data plane's threads.
//!
//! musl's malloc has one lock for all threads, and returns pages to the kernel that it requests again a moment later.
//! An HTTP/2 request needs several dozen blocks, which used to cost as much as the rest of the request. Each thread's
//! cache is bounded and shrinks when it isn't used, so idle connections cost no more.

#![expect(unsafe_code, reason = "CPU per gRPC call 49 → 28 µs (benches/README.md)")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::null_mut;

/// Maximum size of a cached block, in bytes.
const MAX_BLOCK: usize = 128 * 1024;
/// Maximum size of a thread's cache, in bytes.
const MAX_KEPT: usize = 2 * 1024 * 1024;
/// Alignment of all blocks, in bytes, as in malloc.
const ALIGN: usize = 16;
/// Number of classes up to 64 bytes, in steps of 16; above, each doubling has four.
const SMALL_CLASSES: usize = 4;
const CLASSES: usize = SMALL_CLASSES + 4 * (MAX_BLOCK / 64).ilog2() as usize;

/// The allocator, for `#[global_allocator]`.
#[derive(Debug)]
pub struct Allocator;

/// A thread's cache of freed blocks.
struct Kept {
    /// Bytes that may still be added.
    room: Cell<usize>,
    classes: [SizeClass; CLASSES],
}

/// The free blocks of one size: each begins with the address of the next one.
struct SizeClass {
    first: Cell<*mut u8>,
    blocks: Cell<usize>,
    /// The lowest number of blocks since [`give_back`].
    spare: Cell<usize>,
}

thread_local! {
    // No destructor: neither running nor registering one is possible without allocating.
    static KEPT: Kept = const { Kept { room: Cell::new(0), classes: [const { SizeClass::new() }; CLASSES] } };
}

/// From now on this thread caches freed blocks. For threads that live as long as the process: the cache is not freed
/// when a thread ends.
pub fn keep_at_hand() {
    KEPT.with(|kept| kept.room.set(MAX_KEPT));
}

/// Frees the blocks that this thread has not needed since the last call.
pub fn give_back() {
    KEPT.with(|kept| {
        for (number, class) in kept.classes.iter().enumerate() {
            for _ in 0..class.spare.get() {
                // SAFETY: the class has at least `spare` blocks, and each came from the system with this layout.
                unsafe { System.dealloc(kept.pop(number), layout(number)) };
            }
            class.spare.set(class.blocks.get());
        }
    });
}

impl SizeClass {
    const fn new() -> Self {
        Self { first: Cell::new(null_mut()), blocks: Cell::new(0), spare: Cell::new(0) }
    }
}

impl Kept {
    /// Returns a block of this class, or null.
    fn pop(&self, number: usize) -> *mut u8 {
        let class = &self.classes[number];
        let block = class.first.get();
        if !block.is_null() {
            // SAFETY: the list owns the block, and `push` wrote the next one's address to it.
            class.first.set(unsafe { block.cast::<*mut u8>().read() });
            class.blocks.set(class.blocks.get() - 1);
            class.spare.set(class.spare.get().min(class.blocks.get()));
            self.room.set(self.room.get() + layout(number).size());
        }
        block
    }

    /// Adds an unused block of this class to the list. Returns false if there is no room for it.
    ///
    /// # Safety
    /// The block belongs to the caller, who gives it up, and has this class's layout.
    unsafe fn push(&self, number: usize, block: *mut u8) -> bool {
        let Some(room) = self.room.get().checked_sub(layout(number).size()) else { return false };
        self.room.set(room);
        let class = &self.classes[number];
        // SAFETY: the caller gives up the block, which has room for an address.
        unsafe { block.cast::<*mut u8>().write(class.first.get()) };
        class.first.set(block);
        class.blocks.set(class.blocks.get() + 1);
        true
    }
}

/// Returns the class whose blocks fit this layout; `None` if it goes straight to the system.
fn class(wanted: Layout) -> Option<usize> {
    let size = wanted.size();
    if size > MAX_BLOCK || wanted.align() > ALIGN {
        return None;
    }
    if size <= 64 {
        return Some(size.div_ceil(16) - 1);
    }
    let doublings = (size - 1).ilog2() as usize - 6;
    let below = 64 << doublings;
    Some(SMALL_CLASSES + 4 * doublings + (size - below).div_ceil(below / 4) - 1)
}

/// Returns the layout of a class's blocks.
fn layout(class: usize) -> Layout {
    let size = if class < SMALL_CLASSES {
        16 * (class + 1)
    } else {
        let (doublings, quarter) = ((class - SMALL_CLASSES) / 4, (class - SMALL_CLASSES) % 4 + 1);
        (64 << doublings) / 4 * (4 + quarter)
    };
    // SAFETY: the alignment is a power of two, and the size is far from overflow.
    unsafe { Layout::from_size_align_unchecked(size, ALIGN) }
}

// SAFETY: all blocks come from the system's allocator. One that has a class was allocated with its class's layout,
// which is no smaller than the request, and is freed with the same: the class follows from the layout alone, which
// the caller passes again. A cached block has no other owner, because it was freed, and is in one thread's list only.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, wanted: Layout) -> *mut u8 {
        let Some(class) = class(wanted) else { return unsafe { System.alloc(wanted) } };
        let kept = KEPT.with(|kept| kept.pop(class));
        if kept.is_null() { unsafe { System.alloc(layout(class)) } } else { kept }
    }

    unsafe fn alloc_zeroed(&self, wanted: Layout) -> *mut u8 {
        let Some(class) = class(wanted) else { return unsafe { System.alloc_zeroed(wanted) } };
        let kept = KEPT.with(|kept| kept.pop(class));
        if kept.is_null() {
            return unsafe { System.alloc_zeroed(layout(class)) };
        }
        unsafe { kept.write_bytes(0, wanted.size()) };
        kept
    }

    unsafe fn dealloc(&self, block: *mut u8, was: Layout) {
        let Some(class) = class(was) else { return unsafe { System.dealloc(block, was) } };
        if !KEPT.with(|kept| unsafe { kept.push(class, block) }) {
            unsafe { System.dealloc(block, layout(class)) };
        }
    }

    unsafe fn realloc(&self, block: *mut u8, was: Layout, size: usize) -> *mut u8 {
        let wanted = unsafe { Layout::from_size_align_unchecked(size, was.align()) };
        match (class(was), class(wanted)) {
            (None, None) => return unsafe { System.realloc(block, was, size) },
            (old, new) if old == new => return block,
            _ => {}
        }
        let moved = unsafe { self.alloc(wanted) };
        if !moved.is_null() {
            unsafe { block.copy_to_nonoverlapping(moved, was.size().min(size)) };
            unsafe { self.dealloc(block, was) };
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicPtr;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "131,072 sizes take Miri a minute")]
    fn a_class_is_no_smaller_than_what_it_serves_and_at_most_a_quarter_larger() {
        let mut last = 0;
        for size in 1..=MAX_BLOCK {
            let class = class(Layout::from_size_align(size, 8).unwrap()).unwrap();
            assert!(class == last || class == last + 1, "{size} bytes");
            last = class;
            let given = layout(class).size();
            assert!(given >= size && given <= size.div_ceil(16) * 16 * 5 / 4, "{given} for {size} bytes");
        }
        assert_eq!((last + 1, layout(last).size()), (CLASSES, MAX_BLOCK));
        for (size, align) in [(MAX_BLOCK + 1, 1), (64, 32)] {
            assert_eq!(class(Layout::from_size_align(size, align).unwrap()), None);
        }
    }

    #[test]
    fn freed_blocks_come_back_to_the_thread_that_keeps_them_and_go_back_when_spare() {
        thread::spawn(|| {
            let of = Layout::from_size_align(1000, 8).unwrap();
            let blocks = || KEPT.with(|kept| kept.classes[class(of).unwrap()].blocks.get());
            // SAFETY: each block is freed once, with its layout.
            unsafe {
                Allocator.dealloc(Allocator.alloc(of), of);
                assert_eq!(blocks(), 0, "not asked to");
                keep_at_hand();
                let held: Vec<_> = (0..1000).map(|_| Allocator.alloc(of)).collect();
                held.into_iter().for_each(|block| Allocator.dealloc(block, of));
                assert_eq!(blocks(), 1000);
                give_back();
                Allocator.dealloc(Allocator.alloc(of), of);
                give_back();
                assert_eq!(blocks(), 1, "one was needed");
                give_back();
                assert_eq!(blocks(), 0);
                let held: Vec<_> = (0..3000).map(|_| Allocator.alloc(of)).collect();
                held.into_iter().for_each(|block| Allocator.dealloc(block, of));
                assert_eq!(blocks(), MAX_KEPT / 1024, "no more than there is room for");
                let zeroed = Allocator.alloc_zeroed(of);
                assert!((0..of.size()).all(|at| zeroed.add(at).read() == 0), "though it was used before");
                Allocator.dealloc(zeroed, of);
                give_back();
                give_back();
            }
        })
        .join()
        .unwrap();
    }

    /// A block, its layout, and the byte that fills it.
    type Block = (AtomicPtr<u8>, Layout, u8);

    fn filled((block, of, byte): &mut Block) -> bool {
        // SAFETY: the block is ours, and was filled.
        let bytes = unsafe { std::slice::from_raw_parts(*block.get_mut(), of.size()) };
        // Compares with memcmp: a loop over the bytes takes a debug build 15 times as long.
        bytes[0] == *byte && bytes[1..] == bytes[..bytes.len() - 1]
    }

    fn freed(mut block: Block) {
        assert!(filled(&mut block));
        // SAFETY: the block is ours, and was allocated with this layout.
        unsafe { Allocator.dealloc(block.0.into_inner(), block.1) };
    }

    fn size(random: &mut u64) -> usize {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let max = 1 << (*random >> 60).clamp(4, 12) << (*random >> 40 & 7);
        (*random >> 33) as usize % max + 1
    }

    fn new(random: &mut u64, byte: u8) -> Block {
        let (bytes, align) = (size(random), 1 << (*random >> 20 & 5));
        let of = Layout::from_size_align(bytes, align).unwrap();
        // SAFETY: the size is at least 1, and the block has room for it.
        unsafe {
            let block = Allocator.alloc(of);
            assert!(block.addr().is_multiple_of(align));
            block.write_bytes(byte, bytes);
            (block.into(), of, byte)
        }
    }

    fn resized(mut block: Block, random: &mut u64) -> Block {
        assert!(filled(&mut block));
        let (old, was, byte) = block;
        let now = Layout::from_size_align(size(random), was.align()).unwrap();
        let kept = Layout::from_size_align(now.size().min(was.size()), was.align()).unwrap();
        // SAFETY: the block is ours, has this layout, and is as large as asked for afterwards.
        unsafe {
            let moved = Allocator.realloc(old.into_inner(), was, now.size());
            assert!(filled(&mut (moved.into(), kept, byte)));
            moved.write_bytes(byte, now.size());
            (moved.into(), now, byte)
        }
    }

    /// Random blocks, grown, shrunk, freed by this thread or the next one; each keeps its own number throughout. Under
    /// Miri nothing may be left at the end either.
    #[test]
    fn no_block_is_in_two_hands() {
        let rounds: u32 = if cfg!(miri) { 300 } else { 20_000 };
        let ends: Vec<_> = (0..3).map(|_| channel::<Block>()).collect();
        let (mut to, from): (Vec<_>, Vec<_>) = ends.into_iter().unzip();
        to.rotate_left(1);
        let work = |(number, (to, from)): (u64, (Sender<Block>, Receiver<Block>))| {
            thread::spawn(move || {
                keep_at_hand();
                let (mut random, mut held) = (number, Vec::new());
                for round in 0..rounds {
                    held.push(new(&mut random, round as u8));
                    if round % 3 == 0 {
                        let block = held.swap_remove(random as usize % held.len());
                        held.push(resized(block, &mut random));
                    }
                    if held.len() > 100 {
                        let block = held.swap_remove((random >> 7) as usize % held.len());
                        match round % 2 {
                            0 => to.send(block).unwrap(),
                            _ => freed(block),
                        }
                    }
                    from.try_iter().for_each(freed);
                    if round % 1000 == 0 {
                        give_back();
                    }
                }
                drop(to);
                held.into_iter().chain(from).for_each(freed);
                // The second one returns what the first one found in use.
                give_back();
                give_back();
            })
        };
        let threads: Vec<_> = (0..).zip(to.into_iter().zip(from)).map(work).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}
