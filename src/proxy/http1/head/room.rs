//! Space for a head's fields while it is parsed.

use std::mem::MaybeUninit;

/// Fields of an ordinary head, for which there is space on the stack.
pub(super) const USUAL_FIELDS: usize = 96;

/// Space for the fields of one head.
pub(super) struct Room<'b> {
    usual: [MaybeUninit<httparse::Header<'b>>; USUAL_FIELDS],
    more: Vec<MaybeUninit<httparse::Header<'b>>>,
}

impl<'b> Room<'b> {
    /// Enough space for an ordinary head; it grows for a larger one.
    pub(super) fn new() -> Self {
        Self { usual: [const { MaybeUninit::uninit() }; USUAL_FIELDS], more: Vec::new() }
    }

    /// Parses a request's head of at most `max` fields. Returns it and its length in bytes; `None` if it is
    /// incomplete.
    pub(super) fn request<'r>(
        &'r mut self,
        buf: &'b [u8],
        max: usize,
    ) -> Result<Option<(httparse::Request<'r, 'b>, usize)>, httparse::Error> {
        let mut head = httparse::Request::new(&mut []);
        let mut parsed = head.parse_with_uninit_headers(buf, &mut self.usual[..USUAL_FIELDS.min(max)]);
        if parsed == Err(httparse::Error::TooManyHeaders) && max > USUAL_FIELDS {
            self.more = more_room(buf, max);
            head = httparse::Request::new(&mut []);
            parsed = head.parse_with_uninit_headers(buf, &mut self.more);
        }
        parsed.map(|status| complete(head, status))
    }

    /// The same for a response.
    pub(super) fn response<'r>(
        &'r mut self,
        buf: &'b [u8],
        max: usize,
    ) -> Result<Option<(httparse::Response<'r, 'b>, usize)>, httparse::Error> {
        let parser = httparse::ParserConfig::default();
        let mut head = httparse::Response::new(&mut []);
        let usual = &mut self.usual[..USUAL_FIELDS.min(max)];
        let mut parsed = parser.parse_response_with_uninit_headers(&mut head, buf, usual);
        if parsed == Err(httparse::Error::TooManyHeaders) && max > USUAL_FIELDS {
            self.more = more_room(buf, max);
            head = httparse::Response::new(&mut []);
            parsed = parser.parse_response_with_uninit_headers(&mut head, buf, &mut self.more);
        }
        parsed.map(|status| complete(head, status))
    }
}

/// Each field takes at least one line.
fn more_room<'b>(buf: &[u8], max: usize) -> Vec<MaybeUninit<httparse::Header<'b>>> {
    let lines = memchr::memchr_iter(b'\n', buf).count();
    vec![MaybeUninit::uninit(); lines.min(max)]
}

fn complete<T>(head: T, status: httparse::Status<usize>) -> Option<(T, usize)> {
    match status {
        httparse::Status::Complete(len) => Some((head, len)),
        httparse::Status::Partial => None,
    }
}
