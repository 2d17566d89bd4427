//! Transmit buffers that cost memory only where they were written.
#![expect(
    unsafe_code,
    reason = "the library wants a slice that outlives its owner's moves"
)]

use memmap2::{MmapMut, MmapOptions};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;

/// A one-socket set whose socket's transmit buffer is a lazily populated mapping.
///
/// Invariant: `set` is dropped before `memory` (fields are dropped in the order they are declared),
/// and nothing moves the socket out of `set`, so that no slice outlives the mapping.
pub(crate) struct MappedSocket {
    set: SocketSet<'static>,
    handle: SocketHandle,
    /// Never touched again: the socket holds the only live reference to its bytes. `None` where the
    /// mapping was refused and the buffer is on the heap.
    memory: Option<MmapMut>,
}

impl MappedSocket {
    /// A closed socket with room for `capacity` bytes of output and none of input: input never
    /// passes through the library. `used` is a mapping that an earlier socket has left.
    pub(crate) fn new(capacity: usize, used: Option<MmapMut>) -> Self {
        let memory = match used.filter(|m| m.len() == capacity) {
            Some(used) => Ok(used),
            None => MmapOptions::new()
                .len(capacity)
                .no_reserve_swap()
                .map_anon(),
        };
        let (transmit, memory) = match memory {
            Ok(mut memory) => {
                // SAFETY: the pointer is valid for `capacity` initialised bytes for as long as
                // `memory` lives; moving an `MmapMut` does not move what it maps; the set that
                // holds the slice is dropped first (`into_memory` does the same).
                let slice: &'static mut [u8] =
                    unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr(), capacity) };
                (tcp::SocketBuffer::new(slice), Some(memory))
            }
            Err(_) => (tcp::SocketBuffer::new(vec![0; capacity]), None),
        };
        // One byte: without any its window would be closed, and it judges fabricated ACKs by it.
        let socket = tcp::Socket::new(tcp::SocketBuffer::new(vec![0; 1]), transmit);
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(socket);
        Self {
            set,
            handle,
            memory,
        }
    }

    /// The mapping, for another socket.
    pub(crate) fn into_memory(self) -> Option<MmapMut> {
        drop(self.set);
        self.memory
    }

    /// The socket.
    pub(crate) fn socket(&self) -> &tcp::Socket<'static> {
        self.set.get(self.handle)
    }

    /// The socket, to change.
    pub(crate) fn socket_mut(&mut self) -> &mut tcp::Socket<'static> {
        self.set.get_mut(self.handle)
    }

    /// The set, for the library's polls.
    pub(crate) fn set_mut(&mut self) -> &mut SocketSet<'static> {
        &mut self.set
    }
}

impl std::fmt::Debug for MappedSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let socket = self.socket();
        f.debug_struct("MappedSocket")
            .field("state", &socket.state())
            .field("send_queue", &socket.send_queue())
            .finish_non_exhaustive()
    }
}
