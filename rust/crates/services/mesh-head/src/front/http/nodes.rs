//! The nodes of the mesh, connected or not: their identities, and expulsion.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime};

use arcanum_attestor::{EnrolmentError, EvidenceRecord, KnownMember, Pending};
use axum::Json;
use axum::extract::State;
use mesh_api::{Code, ExpelRequest, Node, NodeChange, NodeList, NodeRequest};
use mesh_control::registry::{Registry, Worker};
use mesh_net::trust::TrustError;

use super::admin::read;
use super::error::ApiError;
use super::evidence;
use super::intake::Received;
use super::state::Api;
use super::tokens::blocking;

/// `GET /v1/mesh/nodes`: all nodes that the head knows by their identities: members, expelled ones and those that wait for
/// approval.
pub(super) async fn list(State(api): State<Api>) -> Result<Json<NodeList>, ApiError> {
    let now = Instant::now();
    let mut nodes: BTreeMap<String, Node> = BTreeMap::new();
    for (node_id, member) in noted(&api).await? {
        let shown = Node {
            node_id: node_id.clone(),
            name: member.name,
            state: "absent".into(),
            member_since: Some(member.since),
            certificate_ends: Some(member.until),
            algorithm: known(member.algorithm),
            key_id: known(member.key_id),
            token: known(member.token),
            former_ids: member.former,
            waits_since: waits_since(&member.evidence),
            evidence: member.evidence.map(|record| evidence::of_member(*record)),
            ..Node::default()
        };
        nodes.insert(node_id, shown);
    }
    api.mesh.with_registry(|registry| {
        for worker in registry.iter() {
            let Some(node_id) = worker.node_id() else {
                continue;
            };
            let shown = nodes.entry(node_id.to_owned()).or_default();
            let ago = |then: Instant| now.saturating_duration_since(then).as_secs_f64();
            shown.node_id = node_id.to_owned();
            shown.name.clone_from(&worker.name);
            shown.state = "connected".into();
            shown.address = Some(worker.address.to_string());
            shown.connected_seconds = Some(ago(worker.joined));
            shown.last_seen_seconds = Some(ago(worker.last_seen));
        }
    });
    for node in nodes.values_mut().filter(|node| node.waits_since.is_some()) {
        node.state = "pending".into();
    }
    for (node_id, waiting) in pending(&api).await? {
        let evidence = waiting.evidence;
        let shown = Node {
            evidence: evidence.map(|said| evidence::of_newcomer(*said, waiting.since)),
            node_id: node_id.clone(),
            name: waiting.name,
            state: if waiting.approved {
                "approved"
            } else {
                "pending"
            }
            .into(),
            token: Some(waiting.token),
            waits_since: Some(waiting.since),
            ..Node::default()
        };
        nodes.insert(node_id, shown);
    }
    for (node_id, expulsion) in api.authority.deny_list().list() {
        let state = match &expulsion.replaced_by {
            Some(_) => "replaced",
            None => "expelled",
        };
        let shown = Node {
            node_id: node_id.clone(),
            name: expulsion.name,
            state: state.into(),
            expelled_at: Some(expulsion.since),
            reason: Some(expulsion.reason),
            key_id: expulsion.key_id,
            replaced_by: expulsion.replaced_by,
            ..Node::default()
        };
        nodes.insert(node_id, shown);
    }
    let nodes = nodes.into_values().collect();
    Ok(Json(NodeList { nodes }))
}

/// `POST /v1/mesh/nodes/approve`: the node that waits and that `node` names becomes a member when it asks again, or the
/// change of its evidence is accepted.
pub(super) async fn approve(
    State(api): State<Api>,
    body: Received,
) -> Result<Json<NodeChange>, ApiError> {
    let asked: NodeRequest = read(&api, body)?;
    let waiting = pending(&api).await?.into_iter();
    let mut waiting: BTreeMap<String, String> =
        waiting.map(|(id, waiting)| (id, waiting.name)).collect();
    let changed = noted(&api).await?.into_iter();
    let changed = changed.filter(|(_, member)| waits_since(&member.evidence).is_some());
    waiting.extend(changed.map(|(id, member)| (id, member.name)));
    let (node_id, _) = find(waiting, &asked.node)?;
    let (authority, id) = (api.authority.clone(), node_id.clone());
    let approved = blocking(move || authority.approve(&id)).await?;
    let approved = approved.map_err(|error| match error {
        EnrolmentError::NotPending(_) => ApiError::new(Code::NodeNotFound, error.to_string()),
        error => internal(format!("it is not approved: {error}")),
    })?;
    api.mesh
        .note_admission("node approved", &node_id, &approved.name, "");
    Ok(Json(NodeChange {
        node_id,
        name: approved.name,
        state: "approved".into(),
        was_connected: None,
    }))
}

/// `POST /v1/mesh/nodes/expel`: the node that `node` names (by name or id) is no longer part of the mesh. The
/// body may hold a `reason`.
pub(super) async fn expel(
    State(api): State<Api>,
    body: Received,
) -> Result<Json<NodeChange>, ApiError> {
    let asked: ExpelRequest = read(&api, body)?;
    if asked.reason.len() > LONGEST_REASON || asked.reason.contains(char::is_control) {
        let text = format!("'reason' must be one line of at most {LONGEST_REASON} bytes");
        return Err(ApiError::new(Code::InvalidValue, text));
    }
    // A name that an expelled node had may be another's by now.
    let mut known = members(&api).await?;
    let waiting = pending(&api).await?.into_iter();
    known.extend(waiting.map(|(id, waiting)| (id, waiting.name)));
    let (node_id, name) = find(known, &asked.node)
        .or_else(|error| find(expelled(&api), &asked.node).map_err(|_| error))?;
    if *node_id == *api.own_id {
        let text = format!("{node_id} is this head itself, which cannot be expelled");
        return Err(ApiError::new(Code::InvalidValue, text));
    }
    let connected = is_connected(&api, &node_id);
    // A task of its own, so that it does not end with the request that asked for it.
    let expelling = tokio::task::spawn_blocking({
        let (id, name) = (node_id.clone(), name.clone());
        move || {
            let kept = api
                .authority
                .expel(&id, &name, &asked.reason, SystemTime::now());
            if let Some(text) = api.authority.deny_list().refusal(&id) {
                let mesh = &api.mesh;
                mesh.note_admission("node expelled", &id, &name, &asked.reason);
                mesh.expel(&id, &text.to_string());
                mesh.tell_changes_of_expelled();
                mesh.gossip_expelled(&id, &asked.reason);
            }
            kept
        }
    });
    let kept = expelling
        .await
        .map_err(|error| internal(error.to_string()))?;
    kept.map_err(|error| match error {
        TrustError::ListFull { .. } => ApiError::new(Code::ListFull, error.to_string()),
        error => internal(format!(
            "done, but it will be forgotten when the head starts again: {error}; make room or give the head its directory, and \
             ask again"
        )),
    })?;
    Ok(Json(NodeChange {
        node_id,
        name,
        state: "expelled".into(),
        was_connected: Some(connected),
    }))
}

/// `POST /v1/mesh/nodes/readmit`: ends that, and a quarantine.
pub(super) async fn readmit(
    State(api): State<Api>,
    body: Received,
) -> Result<Json<NodeChange>, ApiError> {
    let asked: NodeRequest = read(&api, body)?;
    let mut out = quarantined(&api);
    out.extend(expelled(&api));
    let (node_id, name) = find(out, &asked.node)?;
    let (authority, id) = (api.authority.clone(), node_id.clone());
    let readmitted = blocking(move || authority.readmit(&id)).await?;
    let readmitted = readmitted.map_err(|error| match error {
        TrustError::NameTaken { .. } => ApiError::new(Code::NameTaken, error.to_string()),
        error => internal(format!("it stays expelled: {error}")),
    })?;
    let was_quarantined = api.mesh.readmit(&node_id);
    api.mesh.gossip_readmitted(&node_id);
    if readmitted.is_none() && !was_quarantined {
        let text = format!(
            "{} is neither expelled nor in quarantine; GET /v1/mesh/nodes lists the nodes",
            asked.node
        );
        return Err(ApiError::new(Code::NodeNotFound, text));
    }
    api.mesh
        .note_admission("node readmitted", &node_id, &name, "");
    if readmitted.is_some() {
        api.mesh.tell_changes_of_expelled();
    }
    let state = match is_connected(&api, &node_id) {
        true => "connected",
        false => "absent",
    };
    Ok(Json(NodeChange {
        node_id,
        name,
        state: state.into(),
        was_connected: None,
    }))
}

/// Time since which a change of a member's evidence waits for approval.
fn waits_since(record: &Option<Box<EvidenceRecord>>) -> Option<u64> {
    let held = record.as_ref()?.held.as_ref()?;
    Some(held.since)
}

fn is_connected(api: &Api, node: &str) -> bool {
    let found = |registry: &Registry| registry.of_node(node).is_some();
    api.mesh.with_registry(found)
}

/// Names of the nodes in quarantine by their ids.
fn quarantined(api: &Api) -> BTreeMap<String, String> {
    let look = |registry: &Registry| registry.reputation.view(Instant::now());
    let views = api.mesh.with_registry(look).into_iter();
    views.map(|view| (view.node_id, view.name)).collect()
}

/// Names of the expelled nodes by their ids.
fn expelled(api: &Api) -> BTreeMap<String, String> {
    let expelled = api.authority.deny_list().list().into_iter();
    let named = expelled.map(|(id, expulsion)| (id, expulsion.name));
    named.collect()
}

/// Names of the others.
async fn members(api: &Api) -> Result<BTreeMap<String, String>, ApiError> {
    let noted = noted(api).await?.into_iter();
    let mut members: BTreeMap<String, String> =
        noted.map(|(id, member)| (id, member.name)).collect();
    api.mesh.with_registry(|registry| {
        let named = |worker: &Worker| Some((worker.node_id()?.to_owned(), worker.name.clone()));
        members.extend(registry.iter().filter_map(named));
    });
    Ok(members)
}

/// The head's roster, whose lock others hold while they write to the disk.
async fn noted(api: &Api) -> Result<BTreeMap<String, KnownMember>, ApiError> {
    let authority = api.authority.clone();
    blocking(move || authority.members()).await
}

/// The nodes that wait for approval.
async fn pending(api: &Api) -> Result<BTreeMap<String, Pending>, ApiError> {
    let authority = api.authority.clone();
    blocking(move || authority.pending()).await
}

fn known(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// The one node of this name or id, or whose id begins so. An id that is not known is taken as it is.
fn find(known: BTreeMap<String, String>, wanted: &str) -> Result<(String, String), ApiError> {
    if let Some(name) = known.get(wanted) {
        return Ok((wanted.to_owned(), name.clone()));
    }
    let is_hex = wanted
        .bytes()
        .all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
    let begins = |id: &str| is_hex && wanted.len() >= SHORTEST_ID && id.starts_with(wanted);
    let mut found = known
        .into_iter()
        .filter(|(id, name)| name == wanted || begins(id));
    match (found.next(), found.next()) {
        (Some(node), None) => Ok(node),
        (Some(_), Some(_)) => Err(ApiError::new(
            Code::AmbiguousNode,
            format!(
                "several nodes are called {wanted:?}: give a node id; GET /v1/mesh/nodes (`hydramesh nodes list`) lists them"
            ),
        )),
        (None, _) if is_hex && wanted.len() == ID_LENGTH => Ok((wanted.to_owned(), String::new())),
        (None, _) => {
            let shown: String = wanted.chars().take(80).collect();
            Err(ApiError::new(
                Code::NodeNotFound,
                format!(
                    "no node is called {shown:?}; GET /v1/mesh/nodes (`hydramesh nodes list`) lists them. Workers of DCF v5 have no identity: dcf.legacy_workers admits them"
                ),
            ))
        }
    }
}

fn internal(text: String) -> ApiError {
    ApiError::new(Code::NotKept, text)
}

const LONGEST_REASON: usize = 256;
/// Digits of a node id, SHA-256 in hex.
const ID_LENGTH: usize = 64;
/// Least number of first digits of an id that name a node.
const SHORTEST_ID: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_found_by_name_id_or_the_begin_of_its_id_and_never_by_two_of_them() {
        let (attic, barn) = ("aaaaaaaa".repeat(8), "bbbbbbbb".repeat(8));
        let known = BTreeMap::from([
            (attic.clone(), "attic".to_owned()),
            (barn.clone(), "aaaaaaaa".to_owned()),
        ]);
        let found = |wanted: &str| find(known.clone(), wanted).map(|(id, _)| id);
        assert_eq!(found("attic").ok(), Some(attic.clone()));
        assert_eq!(found(&attic).ok(), Some(attic.clone()));
        assert_eq!(found("aaaaaaaaa").ok(), Some(attic));
        assert_eq!(found("bbbbbbbb").ok(), Some(barn));
        // A name that looks like another node's id names neither.
        for nobody in ["aaaaaaaa", "bbbb", "", "barn"] {
            assert!(found(nobody).is_err(), "{nobody:?}");
        }
        let unknown = "cc".repeat(32);
        assert_eq!(found(&unknown).ok(), Some(unknown));
    }
}
