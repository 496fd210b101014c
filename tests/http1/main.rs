//! HTTP/1.1 between clients and the app: what is forwarded, limited and refused.

#[path = "../common/mod.rs"]
mod common;

mod answers_name_the_clients_host;
mod apps_that_misbehave;
mod bodies_stream_both_ways;
mod client_abort;
mod clients_are_bounded;
mod examples_answer;
mod forwarded_fields;
mod heads_pass_untouched;
mod heads_survive_anything;
mod limits;
mod silence_is_timed;
mod smuggling_is_refused;
mod upgrade_with_a_body;
