//! Replicas that share a Secret, over years of simulated time: at every moment every API server accepts the certificate
//! of every replica in service. Replicas crash, clocks differ, API servers see changes late, and the Secret is emptied.

use lameduck::webhook::certs::{
    BACKDATE, CA_LIFE, CA_RENEW, LEAF_LIFE, SETTLE, StoredCerts, Write, accepted, go_over, next,
};
use lameduck::webhook::x509::{Root, Seconds, Served, roots};

const DAY: Seconds = 24 * 3600;
const START: Seconds = 1_800_000_000;
const NAME: &str = "lameduck-webhook.lameduck-system.svc";
/// Longest time until an API server uses a changed bundle.
const LAG: Seconds = 20;
/// Time from ready to in service: the replica must see its certificate accepted twice, and the kubelet and kube-proxy
/// take a while.
const INTO_SERVICE: Seconds = 25;
/// Largest error of a clock, in both directions, in seconds.
const SKEW: u64 = 60;

fn names() -> Vec<String> {
    vec![NAME.to_owned(), "lameduck-webhook".to_owned()]
}

/// A small generator with a seed (Knuth's MMIX constants).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// What the replicas and the API servers share.
struct World {
    now: Seconds,
    secret: (u64, StoredCerts),
    /// Every version of the two bundles, with the time of its write.
    bundles: Vec<(Seconds, Vec<Vec<Root>>)>,
}

impl World {
    fn new() -> Self {
        Self {
            now: START,
            secret: (0, StoredCerts::default()),
            bundles: vec![(START - DAY, vec![Vec::new(); 2])],
        }
    }

    fn latest(&self) -> &(Seconds, Vec<Vec<Root>>) {
        self.bundles.last().expect("at least one version")
    }

    /// All bundles that an API server may use now.
    fn trusted(&self) -> impl Iterator<Item = &Vec<Vec<Root>>> {
        let known = self.bundles.iter().rposition(|(since, _)| since + LAG <= self.now).unwrap_or(0);
        self.bundles[known..].iter().map(|(_, bundles)| bundles)
    }
}

/// How far a replica's current check has come.
enum Stage {
    Idle,
    /// The bundles have been read, in this version.
    Bundles(usize),
    /// The Secret has been read too.
    Secret(usize, (u64, StoredCerts)),
}

struct Replica {
    ahead: u64,
    stage: Stage,
    served: Option<Served>,
    accepted: Option<Seconds>,
}

impl Replica {
    fn new(random: &mut Random) -> Self {
        Self { ahead: random.below(2 * SKEW + 1), stage: Stage::Idle, served: None, accepted: None }
    }

    /// Does what `keeper` does, one access at a time. At the end of a check, returns whether there was nothing to do.
    fn step(&mut self, world: &mut World) -> Option<bool> {
        let now = world.now + self.ahead - SKEW;
        match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Idle => self.stage = Stage::Bundles(world.bundles.len()),
            Stage::Bundles(version) => self.stage = Stage::Secret(version, world.secret.clone()),
            Stage::Secret(version, (secret, kept)) => {
                let bundles = world.bundles[version - 1].1.clone();
                if let Ok(candidate) = kept.served()
                    && go_over(now, NAME, &bundles, self.served.as_ref(), &candidate, true)
                {
                    self.served = Some(candidate);
                }
                let good = self.served.as_ref().is_some_and(|served| accepted(now, NAME, &bundles, served));
                self.accepted = good.then(|| self.accepted.unwrap_or(world.now));
                match next(now, &names(), &kept, &bundles).expect("randomness") {
                    Some(Write::Secret(new)) if world.secret.0 == secret => world.secret = (secret + 1, new),
                    Some(Write::Bundles(pem)) if world.bundles.len() == version => {
                        world.bundles.push((world.now, vec![roots(pem.as_bytes()); 2]));
                    }
                    Some(_) => {}
                    None => return Some(true),
                }
                return Some(false);
            }
        }
        None
    }

    fn in_service(&self, now: Seconds) -> bool {
        self.accepted.is_some_and(|since| since + INTO_SERVICE <= now)
    }
}

fn check(world: &World, replicas: &[Replica], seed: u64) {
    for (n, replica) in replicas.iter().enumerate().filter(|(_, replica)| replica.in_service(world.now)) {
        let served = replica.served.as_ref().expect("served");
        for bundles in world.trusted() {
            assert!(
                accepted(world.now, NAME, bundles, served),
                "seed {seed}: replica {n} is not accepted on day {}",
                (world.now - START) / DAY
            );
        }
    }
}

/// Simulates this number of days. `wipes`: the Secret is emptied now and then.
fn simulate(seed: u64, days: u64, wipes: bool) {
    let mut random = Random(seed);
    let mut world = World::new();
    let number = 2 + random.below(2);
    let mut replicas: Vec<_> = (0..number).map(|_| Replica::new(&mut random)).collect();
    let mut idle = vec![false; replicas.len()];
    let mut served = std::collections::HashSet::new();
    // The state at the last check; the same state needs no further check.
    let mut checked = (0, 0, 0, Vec::new());
    while world.now < START + days * DAY {
        // If no replica has anything to do, and time alone changes nothing soon, hours pass; otherwise seconds.
        let settling = world.now < world.latest().0 + SETTLE + 2 * LAG
            || replicas.iter().any(|replica| !replica.in_service(world.now));
        let quiet = idle.iter().all(|idle| *idle) && !settling;
        world.now += if quiet { random.below(DAY / 2) } else { random.below(10) };
        let n = random.below(number) as usize;
        // Checks take seconds, and those of several replicas overlap.
        let looked = (0..3).take(if quiet { 3 } else { 1 }).find_map(|_| replicas[n].step(&mut world));
        idle[n] = looked.unwrap_or(idle[n]);
        if random.below(400) == 0 {
            replicas[n] = Replica::new(&mut random);
            idle[n] = false;
        }
        if wipes && quiet && random.below(60) == 0 {
            world.secret = (world.secret.0 + 1, StoredCerts::default());
            idle.fill(false);
        }
        let starts = replicas.iter().map(|replica| {
            replica
                .served
                .as_ref()
                .filter(|_| replica.in_service(world.now))
                .map(|served| served.valid.clone())
        });
        let now = (world.now / DAY, world.trusted().count(), world.bundles.len(), starts.collect::<Vec<_>>());
        if now != checked {
            check(&world, &replicas, seed);
            checked = now;
        }
        served.extend(replicas.iter().filter_map(|replica| Some(replica.served.as_ref()?.der().to_vec())));
    }
    assert!(
        replicas.iter().any(|replica| replica.in_service(world.now)),
        "seed {seed}: no replica is in service"
    );
    assert!(served.len() as u64 > days / (LEAF_LIFE / DAY), "seed {seed}: {} certificates", served.len());
    assert!(world.bundles.len() as u64 > days * DAY / CA_LIFE, "seed {seed}: too few CAs");
    assert!(roots(world.secret.1.ca_crt.as_bytes()).len() <= 2);
    assert!(world.latest().1[0].len() <= 8);
}

#[test]
fn every_replica_is_accepted_at_every_moment() {
    for seed in 0..2 {
        simulate(seed, 400, false);
    }
}

#[test]
fn an_emptied_secret_costs_no_replica_its_certificate() {
    for seed in 100..102 {
        simulate(seed, 150, true);
    }
}

/// Makes all pending writes, and returns their names.
fn settle(now: Seconds, kept: &mut StoredCerts, bundles: &mut [Vec<Root>]) -> Vec<&'static str> {
    let mut done = Vec::new();
    while let Some(write) = next(now, &names(), kept, bundles).expect("randomness") {
        match write {
            Write::Secret(new) => {
                *kept = new;
                done.push("secret");
            }
            Write::Bundles(pem) => {
                bundles.fill(roots(pem.as_bytes()));
                done.push("bundles");
            }
        }
    }
    done
}

#[test]
fn a_new_ca_is_trusted_before_it_is_used_and_the_old_one_until_it_expires() {
    let (mut kept, mut bundles) = (StoredCerts::default(), vec![Vec::new(); 2]);
    assert_eq!(settle(START, &mut kept, &mut bundles), ["secret", "bundles"]);
    assert_eq!(settle(START, &mut kept, &mut bundles), [""; 0]);
    let first = bundles[0].clone();

    let renewal = START + CA_LIFE - CA_RENEW + 10;
    let late = renewal - 15 * DAY;
    settle(late, &mut kept, &mut bundles);
    let leaf = kept.tls_crt.clone();
    assert_eq!(settle(renewal, &mut kept, &mut bundles), ["secret", "bundles"]);
    assert_eq!((kept.tls_crt.as_str(), bundles[0].len()), (leaf.as_str(), 2), "the leaf stays for now");
    assert!(bundles[0].contains(&first[0]));
    assert_eq!(settle(renewal + SETTLE - 5, &mut kept, &mut bundles), [""; 0]);
    assert_eq!(settle(renewal + SETTLE, &mut kept, &mut bundles), ["secret"]);
    let second = kept.served().expect("a leaf");
    assert!(second.verified_by(&bundles[0], NAME, renewal) && !second.verified_by(&first, NAME, renewal));

    let over = START + CA_LIFE + 10;
    settle(over - DAY, &mut kept, &mut bundles);
    assert!(bundles[0].contains(&first[0]), "trusted until it has expired");
    settle(over, &mut kept, &mut bundles);
    assert!(bundles[1].len() == 1 && roots(kept.ca_crt.as_bytes()) == bundles[1]);
}

#[test]
fn a_leaf_is_renewed_in_time_by_the_same_ca() {
    let (mut kept, mut bundles) = (StoredCerts::default(), vec![Vec::new()]);
    settle(START, &mut kept, &mut bundles);
    let (leaf, bundle) = (kept.tls_crt.clone(), bundles.clone());
    settle(START + 19 * DAY, &mut kept, &mut bundles);
    assert_eq!(kept.tls_crt, leaf);
    assert_eq!(settle(START + 21 * DAY, &mut kept, &mut bundles), ["secret"]);
    assert_ne!(kept.tls_crt, leaf);
    assert_eq!(bundles, bundle);
}

#[test]
fn a_changed_bundle_is_corrected() {
    let (mut kept, mut bundles) = (StoredCerts::default(), vec![Vec::new(); 2]);
    settle(START, &mut kept, &mut bundles);
    let right = bundles.clone();
    bundles[1] = Vec::new();
    assert_eq!(settle(START + 60, &mut kept, &mut bundles), ["bundles"]);
    assert_eq!(bundles, right);
}

#[test]
fn a_secret_of_garbage_is_replaced() {
    let (mut good, mut bundles) = (StoredCerts::default(), vec![Vec::new()]);
    settle(START, &mut good, &mut bundles);
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned();
    let changes: [fn(&mut StoredCerts, String); 4] = [
        |kept, text| kept.ca_crt = text,
        |kept, text| kept.ca_key = text,
        |kept, text| kept.tls_crt = text,
        |kept, text| kept.tls_key = text,
    ];
    for change in changes {
        let (mut kept, mut bundles) = (good.clone(), bundles.clone());
        change(&mut kept, garbage.clone());
        settle(START + 60, &mut kept, &mut bundles);
        assert!(accepted(START + 60, NAME, &bundles, &kept.served().expect("a leaf")));
    }
}

#[test]
fn without_a_configuration_to_look_at_the_certificate_is_served_at_once() {
    let mut kept = StoredCerts::default();
    assert_eq!(settle(START, &mut kept, &mut []), ["secret"]);
    let served = kept.served().expect("a leaf");
    assert!(served.valid.contains(&START) && START - served.valid.start == BACKDATE);
    assert!(go_over(START, NAME, &[], None, &served, true) && accepted(START, NAME, &[], &served));
}

#[test]
fn a_ca_of_a_clock_that_ran_ahead_is_replaced() {
    let (mut kept, mut bundles) = (StoredCerts::default(), vec![Vec::new(); 2]);
    settle(START + 8 * 3600, &mut kept, &mut bundles);
    // After the clock was corrected, that CA is not valid for hours.
    settle(START, &mut kept, &mut bundles);
    assert!(accepted(START, NAME, &bundles, &kept.served().expect("a leaf")), "not ready");
    assert_eq!(settle(START, &mut kept, &mut bundles), [""; 0], "nothing is left to do");
}
