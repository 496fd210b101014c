//! The drain: every kind of running work ends well, whatever triggers the drain.

#[path = "../common/mod.rs"]
mod common;

mod app_dies_while_draining;
mod app_is_told_of_the_drain;
mod app_outlives_sigterm;
mod app_own_hook;
mod compressed_event_stream_ends;
mod deadline_answers;
mod drain_hook;
mod drain_machine;
mod drain_rules;
mod drain_tells_its_story;
mod empty_drain_returns_after_lame_duck;
mod event_stream_ends_on_boundary;
mod every_caller_is_answered;
mod every_schedule_is_answered;
mod front_doors_overlap;
mod gate;
mod gate_loom;
mod handshake_across_sigterm;
mod health_checks;
mod idle_connections_close_last;
mod lame_duck_waits_for_new_callers;
mod leases_hold_a_drain;
mod long_polls_end;
mod long_request_finishes;
mod resume_starts_over;
mod second_signal_forces;
mod sidecar_signals;
mod sigterm_before_first_byte;
mod simulated_plane;
mod slow_reader_gets_last_byte;
mod streaming_body_counts_to_last_byte;
mod websocket_gets_1001;
mod websocket_is_not_cut_inside_a_message;
